"""A posterior's denoiser by regression on rewarded draws of the prior, before any path is drawn.

With w = r(x_0)^beta / Z and R = x_0 - D(x_k), D the prior's prediction, the tilted prediction is

    D(x_k) + E[(w - b) R | x_k] / E[w | x_k]

for any b that depends on x_k alone, since E[R | x_k] = 0 under a prior that predicts the mean. As
b = r(D(x_k))^beta / Z takes what x_k already says of the reward out of the noise, late levels,
where D is nearly x_0, are left where they are. With many levels this is the posterior; with few it
is where fine-tuning starts. The reward needs no gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import GaussianDiffusion
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.ema import Average, TrainedState
from rtb_rl.training.pretrain import random_level
from rtb_rl.training.rates import cosine
from rtb_rl.training.scoring import score
from rtb_rl.training.seeding import GeneratorState
from rtb_rl.training.task import Task


@dataclass(frozen=True)
class TiltSettings:
    """How a posterior learns from rewarded draws."""

    draws: int = 5000
    """Of the prior, in all."""
    steps: int = 1000
    batch: int = 128
    learning_rate: float = 1e-4
    """Falls to zero along a cosine."""
    gradient_clip: float = 1.0
    average_decay: float = 0.98


class DrawRewarded(Protocol):
    """`n` draws of the prior [n, *event], their conditions, log r and log Z of each, nats [n]."""

    def __call__(
        self, n: int, *, generator: Generator
    ) -> tuple[Tensor, Condition, Tensor, Tensor]: ...


class TiltTrainer:
    """Moves `task.posterior` from the prior to the tilted prediction; `average.module`.

    Loss, nats a path: K c_k^2 (w |Delta|^2 / 2 - (w - b) Delta . R), Delta what the posterior
    predicts more than the prior, c_k the mean of a step by the prediction, in spreads. InputError
    for another diffusion than GaussianDiffusion.
    """

    def __init__(
        self,
        task: Task,
        rewarded: DrawRewarded,
        beta: float,
        settings: TiltSettings,
        *,
        generator: Generator,
    ):
        if not isinstance(task.diffusion, GaussianDiffusion):
            raise InputError(
                "a start from rewarded draws needs a GaussianDiffusion, not"
                f" {type(task.diffusion).__name__}; leave out the start, or the learned law of the"
                " first noise"
            )
        self.task, self.rewarded, self.beta = task, rewarded, beta
        self.settings, self.generator, self.diffusion = settings, generator, task.diffusion
        self.trained = [p for p in task.posterior.parameters() if p.requires_grad]
        self.average = Average(task.posterior, settings.average_decay)
        self.optimiser = torch.optim.AdamW(
            self.trained, settings.learning_rate, weight_decay=0.0, fused=True
        )

    def update(self, step: int) -> Mapping[str, Tensor]:
        """One gradient step."""
        settings = self.settings
        self.optimiser.param_groups[0]["lr"] = cosine(settings.learning_rate, step, settings.steps)
        loss = self.loss(settings.batch)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, settings.gradient_clip)
        self.optimiser.step()
        self.average.update(self.task.posterior)
        return {"tilt/loss": loss.detach(), "tilt/gradient_norm": norm}

    def loss(self, n: int) -> Tensor:
        """Of `n` draws at one random level each; a scalar with graph."""
        task, diffusion = self.task, self.diffusion
        x0, condition, log_reward, log_z = self.rewarded(n, generator=self.generator)
        level = random_level(n, diffusion.levels, generator=self.generator)
        x = diffusion.corrupt(x0, level, generator=self.generator)
        with torch.no_grad():
            before = task.prior(x, level, condition)
            weight = (self.beta * log_reward - log_z).exp()
            guess = (self.beta * score(task, before, condition)[0] - log_z).exp()
            guess = guess.clamp(max=weight.max())
        more = (task.posterior(x, level, condition) - before).flatten(1)
        against = (more * (x0 - before).flatten(1)).sum(1)
        in_nats = (diffusion.weight_x0[level] / diffusion.std[level]).square().flatten().to(more)
        each = weight * more.square().sum(1) / 2 - (weight - guess) * against
        return diffusion.levels * (in_nats * each).mean()

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold."""
        return {
            "posterior": TrainedState(self.task.posterior),
            "average": self.average,
            "optimiser": self.optimiser,
            "generator": GeneratorState(self.generator),
        }
