"""The whole interface between a modality and fine-tuning."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Generator, Tensor, nn

from rtb_rl.core import Diffusion, LogReward, Sampler
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError


class DrawConditions(Protocol):
    """`n` conditions, and for each a data point if the task has data: (condition, x0 or None)."""

    def __call__(self, n: int, *, generator: Generator) -> tuple[Condition, Tensor | None]: ...


class DrawTarget(Protocol):
    """Exact draws of prior * r^beta / Z, `n` a row: [rows, n, *event]; without condition [n,
    *event].
    """

    def __call__(self, condition: Condition, n: int, *, generator: Generator) -> Tensor: ...


def no_conditions(n: int, *, generator: Generator) -> tuple[Condition, Tensor | None]:
    """For a task without conditions and without data."""
    return None, None


def evaluate_nothing(posterior: Sampler) -> Mapping[str, float]:
    """For a task whose diagnostics are its evaluation."""
    return {}


@dataclass(frozen=True)
class Task:
    """The seven things fine-tuning needs, and exact draws of the target where there are any.

    `posterior` must start as the prior: a copy of it, or the same network behind an adapter that is
    zero. `prior` is frozen here, and both are put into evaluation mode: one without dropout is one
    law, whose paths are drawn and scored alike. `log_reward` is log r without beta. `draw_target`
    draws from the target at beta 1; diagnostics take their upper bound of log Z from it.
    """

    name: str
    diffusion: Diffusion
    prior: nn.Module
    posterior: nn.Module
    log_reward: LogReward
    draw_conditions: DrawConditions = no_conditions
    evaluate: Callable[[Sampler], Mapping[str, float]] = evaluate_nothing
    draw_target: DrawTarget | None = None

    def __post_init__(self):
        self.prior.requires_grad_(False).eval()
        self.posterior.eval()


def trainable(task: Task) -> list[nn.Parameter]:
    """The parameters of the posterior that are to be trained. InputError where there are none.

    Puts it into evaluation mode, in which it must stay: with dropout a path would be drawn with one
    mask and differentiated with another, by a generator that no checkpoint holds.
    """
    task.posterior.eval()
    found = [p for p in task.posterior.parameters() if p.requires_grad]
    if not found:
        raise InputError(
            f"the posterior of task {task.name!r} has no parameter to train: all are frozen, as a"
            " copy of a prior is, or it is the prior itself; give a copy with requires_grad_()"
        )
    return found
