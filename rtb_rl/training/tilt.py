"""A posterior's denoiser by regression on rewarded paths of the prior, before any of its own.

A step of the prior from x_k has mean m and spread s, so that xi = (x_{k-1} - m) / s is N(0, I)
given x_k. With w = r(x_0)^beta / Z of the path's end, the step of the posterior has the mean

    m + s E[(w - b) xi | x_k] / E[w | x_k]

for any b that depends on x_k alone: exact at every number of levels, since E[xi | x_k] = 0. As
b = r(D(x_k))^beta / Z, D the prior's prediction, takes what x_k already says of the reward out of
the noise, late levels are left where they are. This is the mean of the steps that maximises the
likelihood of target paths; what is left for fine-tuning is the noise of finitely many paths. The
reward needs no gradient.
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
    """How a posterior learns from rewarded paths of the prior."""

    paths: int = 10_000
    """In all."""
    steps: int = 1000
    batch: int = 128
    learning_rate: float = 2e-4
    """Falls to zero along a cosine."""
    gradient_clip: float = 1.0
    average_decay: float = 0.98


class DrawStep(Protocol):
    """One step of each of some paths of the prior, at these levels, int64 [n].

    Returns x_k and x_{k-1} [n, *event], conditions, log r of the paths' ends and log Z, nats [n].
    """

    def __call__(
        self, level: Tensor, *, generator: Generator
    ) -> tuple[Tensor, Tensor, Condition, Tensor, Tensor]: ...


class TiltTrainer:
    """Moves `task.posterior` from the prior to the tilted steps; `average.module` is the result.

    Loss, nats a path: K (w |delta|^2 / 2 - (w - b) delta . xi), delta how many spreads the
    posterior's mean is from the prior's. InputError for another diffusion than GaussianDiffusion.
    """

    def __init__(
        self,
        task: Task,
        draw_step: DrawStep,
        beta: float,
        settings: TiltSettings,
        *,
        generator: Generator,
    ):
        if not isinstance(task.diffusion, GaussianDiffusion):
            raise InputError(
                "a start from paths of the prior needs a GaussianDiffusion, not"
                f" {type(task.diffusion).__name__}; leave out the start, or the learned law of the"
                " first noise"
            )
        self.task, self.draw_step, self.beta = task, draw_step, beta
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
        """Of `n` steps at random levels; a scalar with graph."""
        task, diffusion = self.task, self.diffusion
        level = random_level(n, diffusion.levels, generator=self.generator)
        x, below, condition, log_reward, log_z = self.draw_step(level, generator=self.generator)
        with torch.no_grad():
            prediction = task.prior(x, level, condition)
            before = diffusion.kernel(prediction, x, level)
            noise = (below - before.mean) / before.std
            weight = (self.beta * log_reward - log_z).exp()
            guess = (self.beta * score(task, prediction, condition)[0] - log_z).exp()
            guess = guess.clamp(max=weight.max())
        after = diffusion.kernel(task.posterior(x, level, condition), x, level)
        moved = ((after.mean - before.mean) / before.std).flatten(1)
        gain = (moved * noise.flatten(1)).sum(1)
        each = weight * moved.square().sum(1) / 2 - (weight - guess) * gain
        return diffusion.levels * each.mean()

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold."""
        return {
            "posterior": TrainedState(self.task.posterior),
            "average": self.average,
            "optimiser": self.optimiser,
            "generator": GeneratorState(self.generator),
        }
