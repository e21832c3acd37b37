"""The paths of an update, from every source of the mix."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    SampleReplay,
    Trajectory,
    conditions,
    log_ratio,
    noise_back,
    rollout_step_by_step,
)
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.training.scoring import score
from rtb_rl.training.settings import FinetuneSettings
from rtb_rl.training.task import Task


@dataclass(frozen=True)
class Part:
    """Scored paths of one source, or of all of them.

    `log_ratio` [batch] = log p_post - log p_prior of each, and `log_reward` [batch], nats.
    `on_policy` [batch]: whether it was drawn from the posterior as it is. `so_far` [K + 1, batch]:
    for these, the log-ratio of the steps from x[K] down to each x[k]; zero elsewhere.
    """

    path: Trajectory
    log_ratio: Tensor
    log_reward: Tensor
    on_policy: Tensor
    so_far: Tensor


class PathSource:
    """Draws the paths of an update and scores them; remembers final points for the replay.

    `floored` is the number of rewards in the last draw that were below the floor, as minus infinity
    is.
    """

    def __init__(self, task: Task, settings: FinetuneSettings, *, generator: Generator):
        self.task, self.settings, self.generator = task, settings, generator
        capacity, tilt = settings.replay_capacity, settings.replay_tilt
        self.replay = SampleReplay(capacity, tilt=tilt, device=generator.device)
        self.floored = 0

    def draw(self) -> list[Part]:
        """Paths from every source of the mix; on-policy ones first."""
        task, mix, rows = self.task, self.settings.mix, self.settings.conditions
        self.floored = 0
        condition, x0 = task.draw_conditions(rows, generator=self.generator)
        self._check_drawn(condition, x0)
        parts: list[Part] = []
        if mix.on_policy:
            parts.append(self._rollout(task.posterior, task.prior, condition, mix.on_policy))
        if mix.prior:
            drawn = self._rollout(task.prior, task.posterior, condition, mix.prior)
            parts.append(self._elsewhere(drawn.path, -drawn.log_ratio, drawn.log_reward))
        if mix.widened:
            drawn = self._rollout(
                task.posterior,
                task.prior,
                condition,
                mix.widened,
                widening=self.settings.widening,
            )
            parts.append(self._elsewhere(drawn.path, drawn.log_ratio, drawn.log_reward))
        fresh = tuple(parts)
        if mix.data and x0 is not None:
            parts.append(self._noised(x0, condition, self._log_reward(x0, condition)))
        if mix.replay and len(self.replay):
            parts.append(
                self._noised(*self.replay.sample(rows * mix.replay, generator=self.generator))
            )
        if mix.replay:
            for part in fresh:
                self.replay.add(part.path.x0, part.path.condition, part.log_reward)
        return parts

    def _check_drawn(self, condition: Condition, x0: Tensor | None) -> None:
        name, rows = self.task.name, self.settings.conditions
        for what, count in (
            ("conditions", conditions.count(condition)),
            ("data points", None if x0 is None else len(x0)),
        ):
            if count not in (None, rows):
                raise InputError(
                    f"draw_conditions of task {name!r} returned {count} {what} where {rows} were"
                    " asked for; return as many rows as asked for"
                )
        if self.settings.mix.data and x0 is None:
            raise InputError(
                f"the mix takes {self.settings.mix.data} data path a condition, but task"
                f" {name!r} draws no data; set mix.data to 0"
            )

    def _rollout(
        self,
        sampler: nn.Module,
        other: nn.Module,
        condition: Condition,
        times: int,
        *,
        widening: float = 1.0,
    ) -> Part:
        each = conditions.repeat(condition, times)
        drawn = [
            rollout_step_by_step(
                self.task.diffusion,
                sampler,
                other,
                part,
                count,
                widening=widening,
                generator=self.generator,
            )
            for part, count in conditions.split(
                each, self.settings.conditions * times, self.settings.draw_batch
            )
        ]
        x = torch.cat([path.x for path, _ in drawn], 1)
        so_far = torch.cat([ratios for _, ratios in drawn], 1)
        log_reward = self._log_reward(x[0], each)
        on_policy = torch.ones_like(log_reward, dtype=torch.bool)
        return Part(Trajectory(x, each), so_far[0], log_reward, on_policy, so_far)

    def _noised(self, x0: Tensor, condition: Condition, log_reward: Tensor) -> Part:
        task = self.task
        path = noise_back(task.diffusion, x0, condition, generator=self.generator)
        with torch.no_grad():
            ratio = log_ratio(
                task.diffusion, task.posterior, task.prior, path, chunk=self.settings.chunk
            )
        return self._elsewhere(path, ratio, log_reward)

    def _elsewhere(self, path: Trajectory, log_ratio: Tensor, log_reward: Tensor) -> Part:
        """Paths that were not drawn from the posterior."""
        on_policy = torch.zeros_like(log_ratio, dtype=torch.bool)
        so_far = log_ratio.new_zeros(path.x.shape[:2])
        return Part(path, log_ratio, log_reward, on_policy, so_far)

    def _log_reward(self, x0: Tensor, condition: Condition) -> Tensor:
        floor = self.settings.log_reward_floor
        log_reward, floored = score(self.task, x0, condition, floor=floor)
        self.floored += floored
        return log_reward


def merge(parts: list[Part], rows: int) -> Part:
    """The parts as one, paths of a condition next to each other."""

    def joined(take: Callable[[Part], Tensor]) -> Tensor:
        return conditions.interleave_tensors([take(part) for part in parts], rows)

    x = joined(lambda part: part.path.x.transpose(0, 1)).transpose(0, 1)
    condition = conditions.interleave([part.path.condition for part in parts], rows)
    return Part(
        Trajectory(x, condition),
        joined(lambda part: part.log_ratio),
        joined(lambda part: part.log_reward),
        joined(lambda part: part.on_policy),
        joined(lambda part: part.so_far.transpose(0, 1)).transpose(0, 1),
    )
