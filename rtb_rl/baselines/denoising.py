"""Discrete denoising posterior prediction: posteriors of masked diffusion learned without paths."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from rtb_rl.baselines.trainer import BaselineSettings, Learner
from rtb_rl.core import MaskedDiffusion, SampleReplay, conditions, denoising_posterior_loss
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.scoring import LOG_REWARD_FLOOR, score
from rtb_rl.training.task import Task


@dataclass(frozen=True)
class DenoisingSettings:
    """How a posterior is trained by DDPP-LB."""

    updates: int = 2500
    beta: float = 1.0
    """Strength of the reward: the target is prior * r^beta."""
    conditions: int = 32
    """Conditions that points are drawn for."""
    paths: int = 8
    """Points drawn for each of them; an update looks at conditions * paths points of the replay."""
    data: int = 1
    """Data points of each condition in an update (0 or 1), where the task has data."""
    refresh: int = 10
    """Updates between draws of fresh points: only then the posterior's chain is run."""
    replay_capacity: int = 10_000
    """Points that are remembered, the newest; more than are drawn at once."""
    learning_rate: float = 1e-3
    last_learning_rate: float = 1.0
    """The share of the posterior's learning rate to which it falls, linearly over the updates."""
    log_z_learning_rate: float = 1e-3
    gradient_clip: float = 1.0
    """Largest norm of the posterior's gradient."""
    average_decay: float = 0.995
    log_reward_floor: float = LOG_REWARD_FLOOR
    """The least that a log-reward counts, minus infinity first of all."""

    @property
    def shared(self) -> BaselineSettings:
        """What every trained baseline knows of them."""
        return BaselineSettings(
            updates=self.updates,
            beta=self.beta,
            conditions=self.conditions,
            paths=self.paths,
            learning_rate=self.learning_rate,
            last_learning_rate=self.last_learning_rate,
            gradient_clip=self.gradient_clip,
            average_decay=self.average_decay,
            log_reward_floor=self.log_reward_floor,
        )


class OffsetLogZ(nn.Module):
    """offset + network(x, level, condition): log Z of noisy points, nats, [batch].

    The offset is a learned number that starts at the first mean of what the network misses of beta
    log r, so that log Z of any size is fitted. Without it, every point drawn would be made unlikely
    until the network has caught up.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.offset = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def start_at(self, log_weight: Tensor, x: Tensor, level: Tensor, condition: Condition) -> None:
        """With points and their beta log r, [batch]."""
        self.offset.copy_((log_weight - self.network(x, level, condition)).mean())

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        output = self.network(x, level, condition)
        if output.shape != (len(x),):
            raise InputError(
                f"the log Z network returned {tuple(output.shape)} for {len(x)} points; return one"
                f" number a point, shape ({len(x)},)"
            )
        return self.offset + output


class DenoisingPosterior:
    """Trains `task.posterior` by DDPP-LB (arXiv 2410.08134); `average.module` is the result.

    An update fits the whole clean point at one noisy version of it, x, by one evaluation of each
    network. The points are the posterior's own, remembered, and the task's data. `log_z(x, level,
    condition)` -> [batch] learns log Z of every noisy point; it gets an offset here (`OffsetLogZ`).
    Both denoisers count as products over positions: the posterior is right at its last masked
    token, and near right only where those masked together hardly depend on each other.

    InputError for another diffusion than MaskedDiffusion, or settings that draw nothing.
    """

    def __init__(
        self, task: Task, log_z: nn.Module, settings: DenoisingSettings, *, generator: Generator
    ):
        if not isinstance(task.diffusion, MaskedDiffusion):
            raise InputError(
                f"DDPP-LB needs a MaskedDiffusion, not {type(task.diffusion).__name__}: it scores"
                " the tokens that are masked; use trajectory balance"
            )
        _check(settings)
        self.task, self.settings, self.diffusion = task, settings, task.diffusion
        self.learner = Learner(task, settings.shared, generator=generator)
        self.average = self.learner.average
        self.log_z = OffsetLogZ(log_z).to(generator.device)
        self.learner.optimiser.add_param_group(
            {"params": list(self.log_z.parameters()), "lr": settings.log_z_learning_rate}
        )
        self.replay = SampleReplay(settings.replay_capacity, device=generator.device)
        self.floored = 0

    def update(self, step: int) -> Mapping[str, Tensor | float]:
        """One gradient step on remembered points and data; what they said."""
        learner, settings, self.floored = self.learner, self.settings, 0
        if step % settings.refresh == 0:
            self._remember()
        x0, condition, log_reward = self._points()
        if step == 0:
            level = torch.ones(len(x0), dtype=torch.int64, device=x0.device)
            x = self.diffusion.corrupt(x0, level, generator=learner.generator)
            self.log_z.start_at(settings.beta * log_reward, x, level, condition)
        learner.begin(step)
        loss = denoising_posterior_loss(
            self.diffusion,
            learner.posterior,
            learner.prior,
            self.log_z,
            x0,
            condition,
            log_reward,
            settings.beta,
            generator=learner.generator,
        )
        loss.backward()
        norm = learner.descend(step, loss.detach())
        return {
            "ddpp/loss": loss.detach(),
            "ddpp/log_z_offset": self.log_z.offset.detach().clone(),
            "ddpp/log_reward": log_reward.mean(),
            "ddpp/gradient_norm": norm,
            "ddpp/floored": self.floored,
            "ddpp/calls": self.calls,
        }

    def _remember(self) -> None:
        """Fresh points of the posterior into the replay."""
        paths = self.learner.draw()
        self.replay.add(paths.x0, paths.condition, self._score(paths.x0, paths.condition))

    def _points(self) -> tuple[Tensor, Condition, Tensor]:
        """Clean points of an update, their conditions and log-rewards: remembered, then data."""
        task, settings, generator = self.task, self.settings, self.learner.generator
        rows = settings.conditions
        remembered = self.replay.sample(rows * settings.paths, generator=generator)
        if not settings.data:
            return remembered
        condition, x0 = task.draw_conditions(rows, generator=generator)
        if x0 is None:
            return remembered
        if len(x0) != (conditions.count(condition) or rows):
            raise InputError(
                f"draw_conditions of task {task.name!r} returned {len(x0)} data points for"
                f" {conditions.count(condition) or rows} conditions; return one for each, or None"
            )
        points, of_points, log_reward = remembered
        return (
            torch.cat([points, x0]),
            conditions.concatenate([of_points, condition]),
            torch.cat([log_reward, self._score(x0, condition)]),
        )

    def _score(self, x0: Tensor, condition: Condition) -> Tensor:
        floor = self.settings.log_reward_floor
        log_reward, floored = score(self.task, x0, condition, floor=floor)
        self.floored += floored
        return log_reward

    @property
    def calls(self) -> int:
        """Rows sent through prior or posterior so far; a backward pass counts as two more."""
        return self.learner.calls.total

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold."""
        return {**self.learner.parts, "log_z": self.log_z, "replay": self.replay}


def _check(settings: DenoisingSettings) -> None:
    if settings.refresh < 1:
        raise InputError(f"refresh is {settings.refresh}; give 1 or more updates between draws")
    if settings.data not in (0, 1):
        raise InputError(
            f"data is {settings.data}: a condition has one data point; give 1 to take it, or 0"
        )
    drawn = settings.conditions * settings.paths
    if settings.replay_capacity < drawn:
        raise InputError(
            f"replay_capacity is {settings.replay_capacity}, but conditions * paths = {drawn}"
            " points are drawn at once; give at least as many"
        )
