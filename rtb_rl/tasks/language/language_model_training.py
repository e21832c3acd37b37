"""Training a small causal language model: the reward of a posterior, or the judge of it."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from rtb_rl.nn.transformer import CausalTransformer
from rtb_rl.tasks.language.codec import TextCodec
from rtb_rl.tasks.language.language_model import ROWS, LanguageModel, in_batch
from rtb_rl.tasks.language.texts import Story
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.ema import Average
from rtb_rl.training.loop import train
from rtb_rl.training.rates import cosine
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import GeneratorState, generator_for
from rtb_rl.training.stage import complete, device_for_training

HELD_OUT = 200  # stories at most, by which the best weights are chosen


@dataclass(frozen=True)
class LanguageModelSettings:
    """A causal transformer and how it is trained."""

    width: int = 128
    depth: int = 4
    heads: int = 4
    steps: int = 500
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    half_precision: bool = False
    """Evaluate the network's blocks in bfloat16."""
    token_dropout: float = 0.1
    """Share of the tokens read that are replaced by the mask: few stories are soon known by heart.
    """
    average_decay: float = 0.99
    choose_every: int = 50
    """Updates between looks at stories held out; the weights that are best there are kept."""


class LanguageModelTrainer:
    """Maximum likelihood of whole stories, each ended by the end token; keeps the best average."""

    def __init__(
        self,
        network: CausalTransformer,
        codec: TextCodec,
        stories: Sequence[Story],
        settings: LanguageModelSettings,
        *,
        generator: Generator,
    ):
        self.network, self.codec, self.settings = network, codec, settings
        self.generator = generator
        ids = codec.encode([" ".join(story) for story in stories])
        self.ids = [[*each, codec.end] for each in ids]
        self.average = Average(network, settings.average_decay)
        self.best = Best(network)
        self.optimiser = torch.optim.AdamW(
            network.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def update(self, step: int) -> Mapping[str, Tensor]:
        """One gradient step; the loss before it, nats a token."""
        settings, device = self.settings, self.generator.device
        self.optimiser.param_groups[0]["lr"] = cosine(settings.learning_rate, step, settings.steps)
        drawn = torch.randint(
            len(self.ids), (settings.batch,), generator=self.generator, device=device
        )
        tokens = in_batch([self.ids[i] for i in drawn.tolist()], self.codec).to(device)
        dropped = torch.rand(tokens.shape, generator=self.generator, device=device)
        read = torch.where(dropped < settings.token_dropout, self.codec.mask, tokens)
        loss = token_loss(self.network(read), tokens, self.codec.pad)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.average.update(self.network)
        return {"language_model/loss": loss.detach()}

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold."""
        return {
            "network": self.network,
            "average": self.average,
            "best": self.best,
            "optimiser": self.optimiser,
            "generator": GeneratorState(self.generator),
        }


class Best:
    """The weights with the lowest loss so far; a part of a checkpoint."""

    def __init__(self, network: nn.Module):
        self.weights = copy.deepcopy(network.state_dict())
        self.loss = math.inf

    def offer(self, network: nn.Module, loss: float) -> None:
        if loss < self.loss:
            self.weights, self.loss = copy.deepcopy(network.state_dict()), loss

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "loss": str(self.loss)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights, self.loss = state["weights"], float(state["loss"])


def token_loss(logits: Tensor, tokens: Tensor, pad: int) -> Tensor:
    """Mean negative log-likelihood of tokens [batch, length + 1] but the first, nats a token."""
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=pad
    )


def fit_language_model(
    directory: str | Path,
    codec: TextCodec,
    stories: Sequence[Story],
    settings: LanguageModelSettings,
    *,
    seed: int = 0,
) -> LanguageModel:
    """A causal language model of the stories, trained in this directory or loaded from it."""
    device = device_for_training()
    generator = generator_for(seed, "language model", device=device)
    network = CausalTransformer(
        codec.vocabulary,
        width=settings.width,
        depth=settings.depth,
        heads=settings.heads,
        precision=torch.bfloat16 if settings.half_precision else None,
        generator=generator,
    )
    told = {"seed": seed, "stories": len(stories), "codec": codec.sha256}
    run = Run(directory, {**asdict(settings), **told})
    held = min(HELD_OUT, max(1, len(stories) // 10))

    def fit() -> dict[str, Any]:
        trainer = LanguageModelTrainer(
            network, codec, stories[held:], settings, generator=generator
        )
        watched = codec.encode([" ".join(story) for story in stories[:held]])
        tokens = in_batch([[*each, codec.end] for each in watched], codec).to(device)

        @torch.no_grad()
        def observe(step: int) -> None:
            average = trainer.average.module
            losses = [token_loss(average(part), part, codec.pad) for part in tokens.split(ROWS)]
            loss = float(torch.stack(losses).mean())
            trainer.best.offer(average, loss)
            run.log(step, {"language_model/held_out_loss": loss})

        seconds = train(
            run,
            trainer.update,
            trainer.parts,
            steps=settings.steps,
            description="language model",
            log_every=min(settings.choose_every, settings.steps),
            checkpoint_every=5 * settings.choose_every,
            observe=observe,
        )
        network.load_state_dict(trainer.best.weights)
        loss = trainer.best.loss
        return {"seconds": seconds, "held_out_nats": loss, "perplexity": math.exp(loss)}

    complete(run, network, fit)
    return LanguageModel(network.to(device), codec)
