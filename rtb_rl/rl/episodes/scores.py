"""From recorded rewards to returns, D4RL's normalised score, and the scaling of rewards.

A score of 0 is the mean return of random actions, 100 that of D4RL's expert (arXiv 2004.07219).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from rtb_rl.errors import InputError
from rtb_rl.rl.catalogue import OGBENCH, environment_of, longest_prefix

ROUNDING = 1e-6  # of a return: what sums of float32 rewards can be off by

Returns = TypeVar("Returns", float, np.ndarray, Tensor)

REFERENCE_RETURNS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "halfcheetah": (-280.178953, 12135.0),
        "hopper": (-20.272305, 3234.3),
        "walker2d": (1.629008, 4592.3),
        "ant": (-325.6, 3879.7),
        "antmaze": (0.0, 1.0),
        "kitchen": (0.0, 4.0),
        "pen": (96.262799, 3076.8331017826877),
        "hammer": (-274.856578, 12794.134825156867),
        "relocate": (-6.425911, 4233.877797728884),
        "door": (-56.512833, 2880.5693087298737),
        "maze2d-open": (0.01, 20.66),
        "maze2d-umaze": (23.85, 161.86),
        "maze2d-medium": (13.13, 277.39),
        "maze2d-large": (6.7, 273.99),
        "maze2d-open-dense": (11.17817, 27.166538620695782),
        "maze2d-umaze-dense": (68.537689, 193.66285642381482),
        "maze2d-medium-dense": (44.264742, 297.4552547777125),
        "maze2d-large-dense": (30.569041, 303.4857382709002),
        "minigrid-fourrooms": (0.01442, 2.89685),
    }
)
"""(random, expert) return by environment; the same for all levels and versions."""


def reference_returns(name: str) -> tuple[float, float] | None:
    """(random, expert) return of the D4RL environment that this name begins with.

    The name is that of a task, an environment id or the stem of a file. None for anything else:
    Minari's `mujoco/hopper/medium-v0` isn't D4RL's data, and `*-v5` are other environments, as are
    those with options (`environment_ids`).
    """
    key = None if re.search(r"-v[5-9]$|\{", name) else longest_prefix(name, REFERENCE_RETURNS)
    return None if key is None else REFERENCE_RETURNS[key]


def normalised_score(returns: Returns, reference: tuple[float, float]) -> Returns:
    """100 (return - random) / (expert - random), for a number, an array or a tensor of returns."""
    random, expert = reference
    if not random < expert:
        raise InputError(
            f"reference returns (random, expert) are ({random:g}, {expert:g}), but the expert's "
            "must be the larger; swap or correct them"
        )
    return 100 * (returns - random) / (expert - random)


@dataclass(frozen=True, eq=False)
class EpisodeLog:
    """Rewards and end flags of every recorded row, the rows that training drops included.

    `rewards` float32, `terminals` and `timeouts` bool, all [rows], as recorded. `horizon` is the
    step at which the environment cuts an episode, None where unknown: a cut before it is the
    collector's, so that episode is partial.
    """

    rewards: np.ndarray
    terminals: np.ndarray
    timeouts: np.ndarray
    horizon: int | None = None

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """First row and one past the last row of every episode, an unfinished last one included."""
        stops = np.flatnonzero(self.terminals | self.timeouts) + 1
        if len(self.rewards) and (not len(stops) or stops[-1] < len(self.rewards)):
            stops = np.append(stops, len(self.rewards))
        return np.concatenate([[0], stops[:-1]]).astype(np.int64), stops

    @property
    def lengths(self) -> np.ndarray:
        """Steps of every episode, whole or not, int64 [episodes]."""
        starts, stops = self._bounds
        return stops - starts

    @property
    def returns(self) -> np.ndarray:
        """Undiscounted sum of rewards of every episode, whole or not, float64 [episodes]."""
        return np.add.reduceat(self.rewards.astype(np.float64), self._bounds[0])

    @property
    def whole(self) -> np.ndarray:
        """Which episodes ran to their end, bool [episodes]: terminated, or cut at the horizon.

        Where no episode reaches the horizon the data was recorded with a shorter one: that of the
        longest cut episode.
        """
        last = self._bounds[1] - 1
        terminated, cut = self.terminals[last], self.timeouts[last] & ~self.terminals[last]
        if self.horizon is None or not cut.any():
            return terminated | cut
        return terminated | (cut & (self.lengths >= min(self.horizon, self.lengths[cut].max())))


class Recorded(Protocol):
    """Anything with a log of its episodes, such as a TransitionDataset."""

    @property
    def log(self) -> EpisodeLog: ...


def return_scale(dataset: Recorded) -> float | None:
    """1000 / (largest - smallest return) over whole episodes, the factor for locomotion rewards.

    The scaling of implicit Q-learning (arXiv 2110.06169, section 5) with true episode boundaries.
    None where the returns have no spread: all are equal, or there are fewer than two.
    """
    log = dataset.log
    return _scale_to_thousand(log.returns[log.whole])


def published_return_scale(dataset: Recorded, window: int = 1000) -> float | None:
    """The factor as most published code computes it; published temperatures go with this one.

    That code sees D4RL's Q-learning view: without the rows flagged as timeouts and without the last
    row. It cuts the view at terminals and after `window` rows, so where an episode of 1000 steps
    has 999 rows left the windows drift over the boundaries. A window open at the end doesn't count.
    None where the sums have no spread.
    """
    log = dataset.log
    kept = ~log.timeouts[:-1]
    returns, total, length = [], 0.0, 0
    for reward, terminal in zip(
        log.rewards[:-1][kept].tolist(), log.terminals[:-1][kept].tolist(), strict=True
    ):
        total, length = total + reward, length + 1
        if terminal or length == window:
            returns.append(total)
            total, length = 0.0, 0
    return _scale_to_thousand(np.array(returns))


def critic_rewards(
    name: str, env_id: str | None = None
) -> Literal["scaled", "minus one", "recorded"]:
    """What is done to the rewards of a data set of this name before a critic is trained on them.

    As implicit Q-learning (arXiv 2110.06169) and its published code do: antmaze pays -1 a step
    until the goal, kitchen and hand tasks stay as they were recorded, locomotion is scaled by the
    spread of returns, and so is what no catalogue knows. OGBench's tasks pay -1 a step as they are.
    The environment of the data counts where the name, D4RL's or Minari's, says nothing.
    """
    if name.startswith(OGBENCH) or (env_id or "").startswith(OGBENCH):
        return "recorded"
    plain = "-".join(name.split("/")[1:]) if "/" in name else name  # D4RL/door/human-v2
    environment = environment_of(plain)
    known = (plain, environment.env_id if environment else "", env_id or "")
    if any(re.match(r"antmaze(?!.*dense)", told, re.IGNORECASE) for told in known):
        return "minus one"
    recorded = any(re.match(r"kitchen|FrankaKitchen|AdroitHand|pen\b", told) for told in known)
    return "recorded" if recorded else "scaled"


def antmaze_rewards(rewards: Tensor) -> Tensor:
    """reward - 1: every step towards the goal costs one (antmaze; arXiv 2110.06169, section 5)."""
    return torch.as_tensor(rewards) - 1


def _scale_to_thousand(returns: np.ndarray) -> float | None:
    if not len(returns):
        return None
    spread = float(returns.max() - returns.min())
    return 1000 / spread if spread > ROUNDING * np.abs(returns).max() else None
