"""The paths of an update, from every source of the mix."""

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    SampleReplay,
    Trajectory,
    conditions,
    log_ratio,
    noise_back,
    rollout_against,
)
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.training.scoring import score
from rtb_rl.training.settings import FinetuneSettings
from rtb_rl.training.task import Task

Part = tuple[Trajectory, Tensor, Tensor]
"""Paths, their log-ratios (posterior over prior) and their log-rewards."""


class PathSource:
    """Draws the paths of an update and scores them; remembers final points for the replay.

    `floored` is the number of rewards in the last draw that were minus infinity.
    """

    def __init__(self, task: Task, settings: FinetuneSettings, *, generator: Generator):
        self.task, self.settings, self.generator = task, settings, generator
        self.replay = SampleReplay(settings.replay_capacity, tilt=settings.replay_tilt)
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
            path, ratio, log_reward = self._rollout(
                task.prior, task.posterior, condition, mix.prior
            )
            parts.append((path, -ratio, log_reward))
        if mix.widened:
            parts.append(
                self._rollout(
                    task.posterior,
                    task.prior,
                    condition,
                    mix.widened,
                    widening=self.settings.widening,
                )
            )
        drawn = tuple(parts)
        if mix.data and x0 is not None:
            parts.append(self._noised(x0, condition, self._log_reward(x0, condition)))
        if mix.replay and len(self.replay):
            parts.append(
                self._noised(*self.replay.sample(rows * mix.replay, generator=self.generator))
            )
        if mix.replay:
            for path, _, log_reward in drawn:
                self.replay.add(path.x0, path.condition, log_reward)
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
            rollout_against(
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
        ratio = torch.cat([ratio for _, ratio in drawn])
        return Trajectory(x, each), ratio, self._log_reward(x[0], each)

    def _noised(self, x0: Tensor, condition: Condition, log_reward: Tensor) -> Part:
        task = self.task
        path = noise_back(task.diffusion, x0, condition, generator=self.generator)
        with torch.no_grad():
            ratio = log_ratio(
                task.diffusion, task.posterior, task.prior, path, chunk=self.settings.chunk
            )
        return path, ratio, log_reward

    def _log_reward(self, x0: Tensor, condition: Condition) -> Tensor:
        floor = self.settings.log_reward_floor
        log_reward, floored = score(self.task, x0, condition, floor=floor)
        self.floored += floored
        return log_reward


def merge(parts: list[Part], rows: int) -> Part:
    """The parts as one, paths of a condition next to each other."""
    paths, ratios, log_rewards = zip(*parts, strict=True)
    x = conditions.interleave_tensors([path.x.transpose(0, 1) for path in paths], rows)
    condition = conditions.interleave([path.condition for path in paths], rows)
    return (
        Trajectory(x.transpose(0, 1), condition),
        conditions.interleave_tensors(list(ratios), rows),
        conditions.interleave_tensors(list(log_rewards), rows),
    )
