"""A task together with its exact answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from rtb_rl.core import Denoiser
from rtb_rl.core.protocols import Condition
from rtb_rl.training.task import Task


@dataclass(frozen=True)
class Toy:
    """A task whose posterior is known.

    `task.draw_target` draws from it. `log_z(condition)`: exact log Z, nats, one a row ([1] without
    a condition). `errors(x0, condition)`: what separates draws [rows, n, *event] ([n, *event]
    without a condition) from the exact posterior, by name. `exact_posterior`: the denoiser whose
    chain is the exact posterior, where one is realisable.
    """

    task: Task
    log_z: Callable[[Condition], Tensor]
    errors: Callable[[Tensor, Condition], Mapping[str, float]]
    exact_posterior: Denoiser | None = None
