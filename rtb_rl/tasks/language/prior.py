"""Training a masked diffusion language model from stories."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from rtb_rl.core import (
    IndependentReveals,
    Infilling,
    MaskedDiffusion,
    OnDemand,
    TokenLogits,
    conditions,
    linear_masking,
)
from rtb_rl.errors import InputError
from rtb_rl.nn.transformer import MaskedTransformer
from rtb_rl.tasks.language.codec import TextCodec
from rtb_rl.tasks.language.denoiser import TextPrior
from rtb_rl.tasks.language.prompts import Frame
from rtb_rl.tasks.language.texts import Story
from rtb_rl.training.loop import train
from rtb_rl.training.pretrain import Pretrainer, PretrainSettings
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import complete, device_for_training

WHOLE = 0.5  # share of examples in which every token is free
HELD_OUT = 256  # stories at most, of which the loss is watched


@dataclass(frozen=True)
class TextPriorSettings:
    """A transformer of 1.05 million parameters for 2,000 words, and how it is trained."""

    width: int = 128
    depth: int = 4
    heads: int = 4
    levels: int = 16
    """Denoising steps."""
    ends: bool = False
    """A gap has always the same number of slots, and an end token says where its text ends; else
    the length of a gap is given."""
    half_precision: bool = False
    """Evaluate the network's blocks in bfloat16."""
    pretrain: PretrainSettings = field(
        default_factory=lambda: PretrainSettings(steps=2000, batch=64, learning_rate=3e-3)
    )


class StoryGaps:
    """Examples of the whole story and of single sentences, for `Pretrainer`.

    Half of the examples have every token free; in the others one sentence is, and what follows it
    is there or, every second time, cut off: the prior is asked for both.
    """

    def __init__(self, frame: Frame, stories: Sequence[Story]):
        self.frame, self.stories = frame, sentence_ids(frame.codec, stories)

    def __call__(self, n: int, *, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """`n` points [n, window] and their conditions."""
        device = generator.device
        index = torch.randint(len(self.stories), (n,), generator=generator, device=device).tolist()
        kind, place, cut = torch.rand((3, n), generator=generator, device=device).tolist()
        window = self.frame.window
        tokens = torch.full((n, window), self.frame.codec.pad)
        free, x0 = torch.full((n, window), -1), torch.zeros((n, window), dtype=torch.int64)
        for i, story in enumerate(index):
            row, begin, end = self._example(self.stories[story], kind[i], place[i], cut[i])
            tokens[i, : len(row)] = torch.tensor(row)
            free[i, : end - begin] = torch.arange(begin, end)
            x0[i, : end - begin] = torch.tensor(row[begin:end])
        condition = conditions.move({"tokens": tokens, "free": free}, device)
        assert isinstance(condition, dict)
        return x0.to(device), condition

    def _example(
        self, story: list[list[int]], kind: float, place: float, cut: float
    ) -> tuple[list[int], int, int]:
        """A sequence, and where its free tokens begin and end."""
        frame = self.frame
        if kind < WHOLE:
            row = list(chain(*story))
            return row, 0, len(row)
        hidden = 1 + int(place * (len(story) - 1))  # never the first: a gap has a left context
        gap = story[hidden]
        if frame.ends:
            gap = gap + [frame.codec.end] * (frame.slots - len(gap))
        left = list(chain(*story[:hidden]))
        right = [] if cut < 0.5 else list(chain(*story[hidden + 1 :]))
        return left + gap + right, len(left), len(left) + len(gap)


def sentence_ids(codec: TextCodec, stories: Sequence[Story]) -> list[list[list[int]]]:
    """The ids of each sentence of each story as it stands there: after a space, but the first."""
    parts = [" " * (i > 0) + sentence for story in stories for i, sentence in enumerate(story)]
    ids = iter(codec.encode(parts))
    return [[next(ids) for _ in story] for story in stories]


def frame_for(codec: TextCodec, stories: Sequence[Story], *, ends: bool) -> Frame:
    """Slots for the longest sentence and a window for the longest story."""
    lengths = [list(map(len, story)) for story in sentence_ids(codec, stories)]
    slots = max(max(story) for story in lengths) + ends
    longest = max(sum(story) for story in lengths)
    return Frame(codec, slots, longest + ends * slots, ends)


def fit_text_prior(
    directory: str | Path,
    frame: Frame,
    stories: Sequence[Story],
    settings: TextPriorSettings,
    *,
    seed: int = 0,
) -> TextPrior:
    """A masked language model of the stories, trained in this directory or loaded from it.

    Its loss is the negative evidence bound of the examples of `StoryGaps`, nats a token.
    """
    if len(stories) < 2:
        raise InputError(f"a prior needs at least two stories to train on, not {len(stories)}")
    device = device_for_training()
    generator = generator_for(seed, "text prior", device=device)
    codec = frame.codec
    network = MaskedTransformer(
        codec.vocabulary,
        pad=codec.pad,
        width=settings.width,
        depth=settings.depth,
        heads=settings.heads,
        precision=torch.bfloat16 if settings.half_precision else None,
        generator=generator,
    )
    told = {"seed": seed, "stories": len(stories), "codec": codec.sha256}
    shape = {"slots": frame.slots, "window": frame.window}
    run = Run(directory, {**asdict(settings), **told, **shape})

    def fit() -> dict[str, Any]:
        return _fit(run, frame, network, stories, settings, generator, seed)

    complete(run, network, fit)
    shape = ("width", "depth", "heads", "half_precision")
    recipe = {name: getattr(settings, name) for name in shape}
    return TextPrior(frame, network.to(device), settings.levels, recipe)


def _fit(
    run: Run,
    frame: Frame,
    network: MaskedTransformer,
    stories: Sequence[Story],
    settings: TextPriorSettings,
    generator: Generator,
    seed: int,
) -> dict[str, Any]:
    """Train the network; the results of its stage."""
    codec, held = frame.codec, min(HELD_OUT, len(stories) // 10)
    reveals = IndependentReveals(linear_masking(settings.levels), frame.window)
    diffusion = MaskedDiffusion(frame.window, codec.mask, reveals).to(generator.device)
    denoiser = OnDemand(Infilling(TokenLogits(network, codec.mask)))
    draw = StoryGaps(frame, stories[held:])
    trainer = Pretrainer(diffusion, denoiser, draw, settings.pretrain, generator=generator)
    watched = StoryGaps(frame, stories[:held]) if held else None

    def observe(step: int) -> None:
        if watched is not None:
            loss = held_out_loss(diffusion, trainer.average.module, watched, seed=seed)
            run.log(step, {"prior/held_out_loss": loss})

    seconds = train(
        run,
        trainer.update,
        trainer.parts,
        steps=settings.pretrain.steps,
        description="prior",
        observe=observe,
        checkpoint_every=500,
    )
    denoiser.load_state_dict(trainer.average.module.state_dict())
    loss = held_out_loss(diffusion, denoiser, watched or draw, seed=seed)
    return {"seconds": seconds, "held_out_nats": loss, "perplexity": math.exp(loss)}


@torch.no_grad()
def held_out_loss(
    diffusion: MaskedDiffusion, denoiser: torch.nn.Module, draw: StoryGaps, *, seed: int
) -> float:
    """The negative evidence bound, nats a token, of 512 examples, each noised to one level."""
    device = next(denoiser.parameters()).device
    generator = generator_for(seed, "held out", device=device)
    x0, condition = draw(512, generator=generator)
    stratified = torch.arange(512, device=device) % diffusion.levels + 1
    x = diffusion.corrupt(x0, stratified, generator=generator)
    loss = diffusion.denoising_loss(denoiser(x, stratified, condition), x0, x, stratified)
    used = (condition["free"] >= 0).sum()
    return float(loss.sum() * diffusion.length / used)
