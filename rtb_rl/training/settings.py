"""How a posterior is trained."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from rtb_rl.errors import InputError
from rtb_rl.training.mix import Mix
from rtb_rl.training.scoring import LOG_REWARD_FLOOR


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
    draw_batch: int | None = None
    """Paths drawn at once; None: all of a source. The memory of drawing does not grow beyond it."""
    levels_per_path: int | None = 5
    """Random steps of each path that get a gradient, scaled to be unbiased; None: all of them."""
    chunk: int = 4096
    """Rows (a path at a level) evaluated at once where memory could grow."""
    learning_rate: float = 1e-3
    last_learning_rate: float = 1.0
    """The share of the posterior's learning rate to which it falls, linearly over the updates."""
    log_z_learning_rate: float = 1e-3
    gradient_clip: float = 1.0
    """Largest norm of the posterior's gradient."""
    average_decay: float = 0.995
    replay_capacity: int = 100_000
    replay_tilt: float = 0.0
    """Replayed points are drawn in proportion to r^tilt; with `beta` and prior draws in the mix,
    near the target."""
    widening: float = 1.5
    """Factor on the spread (temperature, for tokens) of the paths of `mix.widened`."""
    log_reward_floor: float = LOG_REWARD_FLOOR
    """The least that a log-reward counts, minus infinity first of all."""


_AT_LEAST_ONE = (
    "updates",
    "steps",
    "draws",
    "conditions",
    "batch",
    "paths",
    "draw_batch",
    "levels_per_path",
    "chunk",
    "replay_capacity",
)
_RATES = (
    "learning_rate",
    "last_learning_rate",
    "log_z_learning_rate",
    "input_rate",
    "replay_tilt",
)
_RULES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (_AT_LEAST_ONE, lambda value: value >= 1, "1 or more"),
    (("gradient_clip", "widening"), lambda value: value > 0, "a number above 0"),
    (_RATES, lambda value: 0 <= value < math.inf, "a finite number, 0 or more"),
    (("average_decay",), lambda value: 0 <= value < 1, "a number from 0 to below 1"),
    (("log_reward_floor",), math.isfinite, "a finite number"),
)
"""Names of settings, what must hold of their values, and that in words."""


def check_settings(settings: object) -> None:
    """InputError for a number with which training would go the wrong way, or not at all.

    `settings`: of fine-tuning, of a start or of a baseline; what one of them lacks, or has as None,
    is not looked at. The strength of the reward is `check_beta`'s.
    """
    for names, holds, wanted in _RULES:
        for name in names:
            value = getattr(settings, name, None)
            if value is not None and not holds(value):
                raise InputError(f"{name} is {value}; give {wanted}")


def check_beta(beta: object, name: str = "beta") -> None:
    """InputError unless the strength of a reward is a number above 0, and finite.

    At 0 the target is the prior, and below it the opposite of what the reward asks for.
    """
    if not (isinstance(beta, int | float) and 0 < beta < math.inf):
        raise InputError(f"{name} is {beta!r}; give a positive number")
