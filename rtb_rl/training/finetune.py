"""The RTB loop: draw paths, score them, weigh them, descend, remember (arXiv 2405.20971 section
2).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    SampleReplay,
    Trajectory,
    backward_in_chunks,
    conditions,
    log_ratio,
    log_weight,
    noise_back,
    random_levels,
    residual,
    rollout_against,
    rtb_loss,
    square,
)
from rtb_rl.core.objective import Penalty
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError, NonFiniteError
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.ema import Average
from rtb_rl.training.mix import LearnedLogZ, Mix, check_mix
from rtb_rl.training.seeding import GeneratorState
from rtb_rl.training.task import Task


@dataclass(frozen=True)
class FinetuneSettings:
    """How a posterior is trained."""

    updates: int = 2500
    beta: float = 1.0
    """Strength of the reward: the target is prior * r^beta."""
    beta_warmup: int = 300
    """Updates over which beta rises linearly to its value."""
    conditions: int = 64
    """Conditions an update; each gets `mix.total` paths."""
    mix: Mix = field(default_factory=Mix)
    levels_per_path: int | None = 5
    """Random steps of each path that get a gradient, scaled to be unbiased; None: all of them."""
    chunk: int = 4096
    """Rows (a path at a level) evaluated at once where memory could grow."""
    learning_rate: float = 1e-3
    log_z_learning_rate: float = 1e-3
    gradient_clip: float = 1.0
    """Largest norm of the posterior's gradient."""
    average_decay: float = 0.995
    replay_capacity: int = 100_000
    log_reward_floor: float = -1e6
    """Stands in for a log-reward of minus infinity."""


class Finetuner:
    """Trains `task.posterior` towards prior * r^beta; `average.module` is the result.

    Raises InputError for a mix that can't be drawn or grouped.
    """

    def __init__(
        self,
        task: Task,
        log_z: LearnedLogZ,
        settings: FinetuneSettings,
        *,
        generator: Generator,
        penalty: Penalty = square,
        accelerator: Accelerator | None = None,
    ):
        check_mix(settings.mix, log_z)
        self.task, self.log_z, self.settings = task, log_z, settings
        self.generator, self.penalty, self.accelerator = generator, penalty, accelerator
        self.average = Average(task.posterior, settings.average_decay)
        self.replay = SampleReplay(settings.replay_capacity)
        self.trained = [p for p in task.posterior.parameters() if p.requires_grad]
        groups = [{"params": self.trained, "lr": settings.learning_rate}]
        if learned := list(log_z.parameters()):
            groups.append({"params": learned, "lr": settings.log_z_learning_rate})
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)

    def update(self, step: int) -> Mapping[str, Tensor | float]:
        """One gradient step on fresh paths; what the residuals said."""
        task, settings = self.task, self.settings
        beta = settings.beta * min(1.0, (step + 1) / max(settings.beta_warmup, 1))
        paths, ratio, log_reward = self._draw_paths()
        _check_finite(step, log_reward=log_reward, log_ratio=ratio)
        ratio.requires_grad_()
        weight = log_weight(log_reward, ratio, beta)
        if step == 0:
            self.log_z.start_at(weight.detach())
        log_z = self.log_z(paths.condition, weight)
        delta = residual(log_z, weight)
        loss = rtb_loss(delta, self.penalty)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        assert ratio.grad is not None
        backward_in_chunks(
            task.diffusion,
            task.posterior,
            paths,
            ratio.grad,
            levels=self._levels(len(ratio)),
            chunk=settings.chunk,
        )
        self._average_over_processes()
        norm = nn.utils.clip_grad_norm_(self.trained, settings.gradient_clip)
        _check_finite(step, loss=loss.detach(), gradient=norm)
        self.optimiser.step()
        self.average.update(task.posterior)
        return {
            "rtb/residual_std": delta.detach().std(),
            "rtb/loss": loss.detach(),
            "rtb/log_z": log_z.detach().mean(),
            "rtb/log_ratio": ratio.detach().mean(),
            "rtb/log_reward": log_reward.mean(),
            "rtb/beta": beta,
            "rtb/gradient_norm": norm,
        }

    def _draw_paths(self) -> tuple[Trajectory, Tensor, Tensor]:
        """Paths from every source of the mix, those of one condition next to each other."""
        task, mix, rows = self.task, self.settings.mix, self.settings.conditions
        condition, x0 = task.draw_conditions(rows, generator=self.generator)
        parts: list[tuple[Trajectory, Tensor, Tensor]] = []
        if mix.on_policy:
            parts.append(self._rollout(task.posterior, task.prior, condition, mix.on_policy))
        if mix.prior:
            path, ratio, log_reward = self._rollout(
                task.prior, task.posterior, condition, mix.prior
            )
            parts.append((path, -ratio, log_reward))
        if mix.data:
            if x0 is None:
                raise InputError(
                    f"the mix takes {mix.data} data path a condition, but task {task.name!r} "
                    f"draws no"
                    " data; set mix.data to 0"
                )
            parts.append(self._noised(x0, condition, self._log_reward(x0, condition)))
        if mix.replay and len(self.replay):
            parts.append(
                self._noised(*self.replay.sample(rows * mix.replay, generator=self.generator))
            )
        if mix.replay:
            self.replay.add(parts[0][0].x0, parts[0][0].condition, parts[0][2])
        return _merge(parts, rows)

    def _rollout(
        self, sampler: nn.Module, other: nn.Module, condition: Condition, times: int
    ) -> tuple[Trajectory, Tensor, Tensor]:
        rows = self.settings.conditions * times
        each = conditions.repeat(condition, times)
        path, ratio = rollout_against(
            self.task.diffusion, sampler, other, each, rows, generator=self.generator
        )
        return path, ratio, self._log_reward(path.x0, each)

    def _noised(
        self, x0: Tensor, condition: Condition, log_reward: Tensor
    ) -> tuple[Trajectory, Tensor, Tensor]:
        task = self.task
        path = noise_back(task.diffusion, x0, condition, generator=self.generator)
        with torch.no_grad():
            ratio = log_ratio(
                task.diffusion, task.posterior, task.prior, path, chunk=self.settings.chunk
            )
        return path, ratio, log_reward

    @torch.no_grad()
    def _log_reward(self, x0: Tensor, condition: Condition) -> Tensor:
        log_reward = self.task.log_reward(x0, condition)
        floor = self.settings.log_reward_floor
        return torch.where(log_reward == -torch.inf, floor, log_reward)

    def _levels(self, batch: int) -> Tensor | None:
        count = self.settings.levels_per_path
        if count is None or count >= self.task.diffusion.levels:
            return None
        return random_levels(self.task.diffusion.levels, count, batch, generator=self.generator)

    def _average_over_processes(self) -> None:
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return
        for parameter in [*self.trained, *self.log_z.parameters()]:
            if parameter.grad is not None:
                mean = self.accelerator.reduce(parameter.grad, reduction="mean")
                assert isinstance(mean, Tensor)
                parameter.grad = mean

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold."""
        return {
            "posterior": self.task.posterior,
            "average": self.average,
            "log_z": self.log_z,
            "optimiser": self.optimiser,
            "replay": self.replay,
            "generator": GeneratorState(self.generator),
        }


def _merge(
    parts: list[tuple[Trajectory, Tensor, Tensor]], rows: int
) -> tuple[Trajectory, Tensor, Tensor]:
    paths, ratios, log_rewards = zip(*parts, strict=True)
    x = conditions.interleave_tensors([path.x.transpose(0, 1) for path in paths], rows)
    condition = conditions.interleave([path.condition for path in paths], rows)
    return (
        Trajectory(x.transpose(0, 1), condition),
        conditions.interleave_tensors(list(ratios), rows),
        conditions.interleave_tensors(list(log_rewards), rows),
    )


def _check_finite(step: int, **terms: Tensor) -> None:
    for name, value in terms.items():
        if not bool(value.isfinite().all()):
            bad = value[~value.isfinite()] if value.ndim else value
            raise NonFiniteError(f"{name} is {float(bad.flatten()[0])} at step {step}")
