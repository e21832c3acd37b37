"""Gaps in sequences of a known Markov chain: a masked model trained on them against the truth."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import MaskedDiffusion, OnDemand, conditions
from rtb_rl.core.protocols import Condition
from rtb_rl.nn.transformer import MaskedTransformer
from rtb_rl.tasks.language.denoiser import TextPrior
from rtb_rl.tasks.language.markov import MarkovChain
from rtb_rl.tasks.language.prompts import Frame
from rtb_rl.training.mix import Mix
from rtb_rl.training.pretrain import PretrainSettings
from rtb_rl.training.settings import FinetuneSettings
from rtb_rl.training.task import Task


class TokenCodec:
    """Tokens 1..V as themselves, 0 to fill up, V + 1 for what is masked, V + 2 for an end."""

    def __init__(self, tokens: int):
        self.pad, self.mask, self.end, self.vocabulary = 0, tokens + 1, tokens + 2, tokens + 3
        self.unknown: int | None = None
        self.never: tuple[int, ...] = (self.pad, self.mask)
        self.sha256 = str(tokens)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [" ".join(map(str, row)) for row in ids]


@dataclass(frozen=True)
class WorldSettings:
    """How a prior and a posterior of gaps in a Markov chain's sequences are trained."""

    levels: int = 32
    width: int = 64
    depth: int = 3
    pretrain: PretrainSettings = field(
        default_factory=lambda: PretrainSettings(
            steps=4000, batch=256, learning_rate=6e-3, level_power=1.0
        )
    )
    finetune: FinetuneSettings = field(
        default_factory=lambda: FinetuneSettings(
            updates=150,
            beta_warmup=1,
            conditions=32,
            mix=Mix(on_policy=8, data=0),
            levels_per_path=None,
            learning_rate=5e-4,
            last_learning_rate=0.05,
            average_decay=0.98,
        )
    )


@dataclass(frozen=True)
class MarkovWorld:
    """Sequences of `left` + `gap` + `right` tokens of a chain, of which the middle is missing.

    log r = log p(right | left, gap), exactly. Token v of the chain is id v + 1.
    """

    chain: MarkovChain
    left: int = 6
    gap: int = 8
    right: int = 6

    @property
    def frame(self) -> Frame:
        return Frame(TokenCodec(self.chain.vocabulary), self.gap, self.window)

    @property
    def window(self) -> int:
        return self.left + self.gap + self.right

    def draw(self, n: int, *, generator: Generator) -> tuple[dict[str, Tensor], None]:
        """Conditions of `n` sequences, for a Task."""
        return self.conditions(self.chain.sample(n, self.window, generator=generator)), None

    def examples(self, n: int, *, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Points [n, gap] with conditions, for pretraining.

        The gap is free; what is to the right of it is there or, every second time, cut off.
        """
        tokens = self.chain.sample(n, self.window, generator=generator) + 1
        given = self.conditions(tokens - 1)
        cut = torch.rand((n, 1), generator=generator, device=tokens.device) < 0.5
        shown = given["tokens"].masked_fill(cut & given["right"], self.frame.codec.pad)
        x0 = tokens[:, self.left : self.left + self.gap]
        return x0, {"tokens": shown, "free": given["free"]}

    def conditions(self, sequences: Tensor) -> dict[str, Tensor]:
        """Those of whole sequences [n, window], without their middles."""
        n, device = len(sequences), sequences.device
        column = torch.arange(self.window, device=device).expand(n, -1)
        after = column >= self.left + self.gap
        hidden = (column >= self.left) & ~after
        return {
            "tokens": (sequences + 1).masked_fill(hidden, self.frame.codec.mask),
            "free": column[:, self.left : self.left + self.gap],
            "right": after,
        }

    def log_reward(self, x0: Tensor, condition: Condition) -> Tensor:
        """log p(right | left, gap), nats: float64 [batch]."""
        assert isinstance(condition, dict)
        right = condition["tokens"][:, self.left + self.gap :]
        return self.chain.log_reward(x0 - 1, right - 1)

    def truth(self, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """log Z [n], and the posterior's token marginals [n, gap, V], by forward and backward."""
        tokens = condition["tokens"] - 1
        given = tokens[:, self.left - 1], tokens[:, self.left + self.gap :], self.gap
        return self.chain.log_z(*given), self.chain.marginals(*given)

    def prior(self, settings: WorldSettings, *, generator: Generator) -> TextPrior:
        """An untrained prior; `examples` train its network."""
        codec = self.frame.codec
        network = MaskedTransformer(
            codec.vocabulary,
            pad=codec.pad,
            width=settings.width,
            depth=settings.depth,
            positions=self.window,
            generator=generator,
        )
        return TextPrior(self.frame, network, settings.levels, {})

    def task(self, prior: TextPrior, network: nn.Module) -> Task:
        """The posterior is `network`, which is given the right context."""
        return Task(
            "markov",
            prior.diffusion,
            OnDemand(prior.left_only()),
            OnDemand(prior.both_sides(network)),
            self.log_reward,
            self.draw,
        )


@torch.no_grad()
def token_marginals(
    diffusion: MaskedDiffusion,
    denoiser: nn.Module,
    condition: dict[str, Tensor],
    n: int,
    *,
    generator: Generator,
) -> Tensor:
    """p(token at each slot) of the chain for each row of the condition: [rows, slots, V].

    The mean over `n` paths of what the denoiser says at the step that reveals a slot, which has
    less noise than counting the tokens drawn there.
    """
    rows = conditions.count(condition) or 1
    each = conditions.repeat(condition, n)
    x = diffusion.start(rows * n, generator=generator)
    total = torch.zeros(())
    for k in range(diffusion.levels, 0, -1):
        level = torch.full((len(x),), k, device=x.device)
        log_probs = OnDemand(denoiser)(x, level, each)
        following = diffusion.kernel(log_probs, x, level).sample(generator=generator)
        revealed = (x == diffusion.mask) & (following != diffusion.mask)
        if bool(revealed.any()):
            found = log_probs[revealed].double().exp()
            if total.ndim == 0:
                total = found.new_zeros((rows, x.shape[1], found.shape[1]))
            row, slot = revealed.nonzero(as_tuple=True)
            total.index_put_((row // n, slot), found, accumulate=True)
        x = following
    return total / n
