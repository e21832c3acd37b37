"""What the trained baselines share: settings, paths, gradient steps, the count of network calls."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from rtb_rl.baselines.draws import CountedDenoiser
from rtb_rl.core import Trajectory, conditions, random_levels, rollout
from rtb_rl.errors import InputError, NonFiniteError
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.ema import Average, TrainedState
from rtb_rl.training.scoring import LOG_REWARD_FLOOR
from rtb_rl.training.seeding import GeneratorState
from rtb_rl.training.settings import check_beta, check_settings
from rtb_rl.training.task import Task, trainable


@dataclass(frozen=True)
class BaselineSettings:
    """How a baseline is trained."""

    updates: int = 2500
    """Times that fresh paths are drawn."""
    beta: float = 1.0
    """Strength of the reward: the target is prior * r^beta."""
    conditions: int = 32
    """Conditions an update."""
    paths: int = 8
    """Paths of each condition; without conditions all paths of an update are one group."""
    draw_batch: int | None = None
    """Paths drawn at once; None: all of an update."""
    levels_per_path: int | None = None
    """Random steps of each path that get a gradient, scaled to be unbiased; None: all of them."""
    chunk: int = 4096
    """Rows (a path at a level) evaluated at once where memory could grow."""
    learning_rate: float = 1e-3
    last_learning_rate: float = 1.0
    """The share of the learning rate to which it falls, linearly over the updates."""
    gradient_clip: float = 1.0
    """Largest norm of the posterior's gradient."""
    average_decay: float = 0.995
    log_reward_floor: float = LOG_REWARD_FLOOR
    """Stands in for a log-reward of minus infinity, where no gradient of it is taken."""


class Calls:
    """What counted denoisers have cost, together; a part of a checkpoint."""

    def __init__(self, *denoisers: CountedDenoiser):
        self.denoisers = denoisers

    @property
    def total(self) -> int:
        return sum(denoiser.calls for denoiser in self.denoisers)

    def state_dict(self) -> dict[str, list[int]]:
        return {"calls": [denoiser.calls for denoiser in self.denoisers]}

    def load_state_dict(self, state: Mapping[str, list[int]]) -> None:
        for denoiser, calls in zip(self.denoisers, state["calls"], strict=True):
            denoiser.calls = calls


class Learner:
    """`task.posterior` while it learns: draws its paths, descends, averages, counts.

    Only parameters that require a gradient are trained. InputError where there are none, and for
    settings without paths or levels, or with a beta of zero or less.
    """

    def __init__(self, task: Task, settings: BaselineSettings, *, generator: Generator):
        _check_settings(task, settings)
        self.task, self.settings, self.generator = task, settings, generator
        self.trained = trainable(task)
        self.prior = CountedDenoiser(task.prior)
        self.posterior = CountedDenoiser(task.posterior)
        self.calls = Calls(self.prior, self.posterior)
        self.average = Average(task.posterior, settings.average_decay)
        self.optimiser = torch.optim.AdamW(
            self.trained, lr=settings.learning_rate, weight_decay=0.0, fused=True
        )

    def draw(self) -> Trajectory:
        """Paths of the posterior for fresh conditions; those of a condition are neighbours."""
        rows, times = self.settings.conditions, self.settings.paths
        condition, _ = self.task.draw_conditions(rows, generator=self.generator)
        if conditions.count(condition) not in (None, rows):
            raise InputError(
                f"draw_conditions of task {self.task.name!r} returned"
                f" {conditions.count(condition)} conditions where {rows} were asked for; return as"
                " many rows as asked for"
            )
        each = conditions.repeat(condition, times)
        diffusion, generator = self.task.diffusion, self.generator
        parts = [
            rollout(diffusion, self.posterior, part, count, generator=generator).x
            for part, count in conditions.split(each, rows * times, self.settings.draw_batch)
        ]
        return Trajectory(torch.cat(parts, 1), each)

    def levels(self, batch: int) -> Tensor:
        """The steps of each path that get a gradient: int64 [count, batch]."""
        every, count = self.task.diffusion.levels, self.settings.levels_per_path
        if count is not None and count < every:
            return random_levels(every, count, batch, generator=self.generator)
        levels = torch.arange(1, every + 1, device=self.generator.device)
        return levels[:, None].expand(-1, batch)

    def share(self, levels: Tensor) -> float:
        """Weight of one step in a loss that is a sum over all K steps, mean over the paths."""
        return self.task.diffusion.levels / levels.numel()

    def begin(self, step: int) -> None:
        """Before gradients are added: clears them and sets the learning rate of update `step`."""
        settings = self.settings
        decay = 1 - (1 - settings.last_learning_rate) * step / settings.updates
        self.optimiser.param_groups[0]["lr"] = settings.learning_rate * decay
        self.optimiser.zero_grad(set_to_none=True)

    @staticmethod
    def add_gradient(loss: Tensor) -> None:
        """Of a part of the loss, which has no graph where all its steps are the prior's own."""
        if loss.requires_grad:
            loss.backward()

    def descend(self, step: int, loss: Tensor) -> Tensor:
        """A step along the gradients that were added; their norm. NonFiniteError for bad ones."""
        norm = nn.utils.clip_grad_norm_(self.trained, self.settings.gradient_clip)
        for name, value in (("loss", loss), ("gradient", norm)):
            if not bool(value.isfinite()):
                raise NonFiniteError(f"{name} is {float(value)} at step {step}")
        self.optimiser.step()
        self.average.update(self.task.posterior)
        return norm

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold."""
        return {
            "posterior": TrainedState(self.task.posterior),
            "average": self.average,
            "optimiser": self.optimiser,
            "generator": GeneratorState(self.generator),
            "calls": self.calls,
        }


def _check_settings(task: Task, settings: BaselineSettings) -> None:
    check_beta(settings.beta)
    check_settings(settings)
    count = settings.levels_per_path
    if count is not None and count > task.diffusion.levels:
        raise InputError(
            f"levels_per_path is {count} for a diffusion of {task.diffusion.levels} levels; give 1"
            f" to {task.diffusion.levels}, or None for all"
        )
