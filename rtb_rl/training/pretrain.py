"""Denoising training of a prior, for any Diffusion."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import Diffusion
from rtb_rl.core.protocols import Condition
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.ema import Average
from rtb_rl.training.rates import cosine
from rtb_rl.training.seeding import GeneratorState


class DrawData(Protocol):
    """`n` data points and their conditions: (x0 [n, *event], condition)."""

    def __call__(self, n: int, *, generator: Generator) -> tuple[Tensor, Condition]: ...


@dataclass(frozen=True)
class PretrainSettings:
    """How a prior is trained."""

    steps: int = 30_000
    batch: int = 256
    learning_rate: float = 1e-3
    """Falls to zero along a cosine."""
    average_decay: float = 0.999
    """Of the exponential moving average that becomes the prior."""
    level_power: float | None = None
    """Levels count by this power of their number, beside what the diffusion's own loss gives them:
    above 0 the noisier ones, where draws begin, count more. The minimiser stays where it is."""


class Pretrainer:
    """Minimises the diffusion's denoising loss at levels drawn uniformly; keeps an average.

    `average.module` is the prior, in evaluation mode. arXiv 2006.11239 algorithm 1, for any
    Diffusion. A denoiser in training mode is trained with its dropout, whose masks are of torch's
    global generator: then alone a run that was interrupted doesn't go on bit for bit.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        denoiser: nn.Module,
        draw: DrawData,
        settings: PretrainSettings,
        *,
        generator: Generator,
    ):
        self.diffusion, self.denoiser, self.draw = diffusion, denoiser, draw
        self.settings, self.generator = settings, generator
        self._weights = _level_weights(diffusion.levels, settings.level_power, generator.device)
        self.average = Average(denoiser, settings.average_decay)
        self.optimiser = torch.optim.AdamW(
            denoiser.parameters(), lr=settings.learning_rate, weight_decay=1e-4, fused=True
        )

    def update(self, step: int) -> Mapping[str, Tensor]:
        """One gradient step; the loss before it."""
        settings = self.settings
        rate = cosine(settings.learning_rate, step, settings.steps)
        self.optimiser.param_groups[0]["lr"] = rate
        x0, condition = self.draw(settings.batch, generator=self.generator)
        level = random_level(len(x0), self.diffusion.levels, generator=self.generator)
        x = self.diffusion.corrupt(x0, level, generator=self.generator)
        prediction = self.denoiser(x, level, condition)
        errors = self.diffusion.denoising_loss(prediction, x0, x, level)
        loss = (errors * self.level_weight(level)).mean()
        self.optimiser.zero_grad(set_to_none=True)
        if loss.requires_grad:  # not where no row of the batch asks the denoiser anything
            loss.backward()
        self.optimiser.step()
        self.average.update(self.denoiser)
        return {"prior/loss": loss.detach()}

    def level_weight(self, level: Tensor) -> Tensor | float:
        """What each level [n] counts: 1 on average over all of them."""
        return 1.0 if self._weights is None else self._weights[level]

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold."""
        return {
            "denoiser": self.denoiser,
            "average": self.average,
            "optimiser": self.optimiser,
            "generator": GeneratorState(self.generator),
        }


def random_level(n: int, levels: int, *, generator: Generator) -> Tensor:
    """A level of 1..levels for each of `n` rows, uniformly: int64 [n]."""
    return torch.randint(1, levels + 1, (n,), generator=generator, device=generator.device)


def _level_weights(levels: int, power: float | None, device: torch.device) -> Tensor | None:
    """Of the levels 0..K, [K + 1], 1 on average over 1..K; None without a power."""
    if power is None:
        return None
    each = torch.arange(levels + 1, device=device).double() ** power
    return (each / each[1:].mean()).float()
