"""Recorded transitions (observation, action, reward, next observation, end) as tensors.

Actions are kept in [-1, 1], rescaled from the box they were recorded in. `terminated` (the
environment ended: bootstrap 0) and `truncated` (the episode was cut: bootstrap) stay apart; where a
recording sets both, terminal wins. A next observation never belongs to another episode.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rtb_rl.errors import InputError
from rtb_rl.rl.data.rows import check_rows
from rtb_rl.rl.episodes.scores import EpisodeLog, reference_returns

ROUNDING = 1e-4  # of the half-width of the box: what float32 and a rescaling can be off by


@dataclass(frozen=True, eq=False)
class Transitions:
    """A batch: observations [n, d_o], actions [n, d_a], rewards [n], next_observations [n, d_o],
    terminated [n] (bool; the value of the next observation counts 0 where True)."""

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminated: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class TransitionDataset:
    """All transitions of a recording whose next observation is known or not needed.

    Tensors are float32, flags bool, [n, ...] in recorded order. `log` keeps the rewards and ends of
    all recorded rows, so returns are those of the recording whatever is done to `rewards`.
    `env_id` names the environment to evaluate in; `reference_returns` are (random, expert);
    `action_low`, `action_high` [d_a] the box actions were recorded in; `notes` say what was
    dropped, rescaled or clipped.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminated: Tensor
    truncated: Tensor
    action_low: Tensor
    action_high: Tensor
    log: EpisodeLog
    name: str
    source: str
    sha256: str
    env_id: str | None = None
    reference_returns: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Any],
        *,
        name: str,
        env_id: str | None = None,
        action_box: tuple[Any, Any] = (-1.0, 1.0),
        clip_actions: bool = False,
        reference: tuple[float, float] | None = None,
        horizon: int | None = None,
        source: str = "arrays",
        sha256: str | None = None,
        notes: tuple[str, ...] = (),
    ) -> "TransitionDataset":
        """The transitions of arrays under the flat D4RL keys (gymnasium's names of the flags too).

        observations [rows, d_o], actions [rows, d_a], rewards, terminals, timeouts [rows]; where
        the successor of an episode's last row is known also next_observations [rows, d_o] or
        infos/final_observations [episodes, d_o]. Rows without terminal and without known successor
        are dropped. Actions outside `action_box` (low, high) are an InputError unless
        `clip_actions`. `horizon`: the step at which the environment itself cuts an episode.
        """
        rows = check_rows(arrays)
        actions, low, high, remarks = _in_unit_box(rows.actions, action_box, clip_actions)
        kept = rows.terminals | rows.known
        if not kept.all():
            remarks += (
                f"{len(kept) - kept.sum()} of {len(kept)} transitions dropped: next observation "
                "not recorded (last rows of cut episodes)",
            )
        if not kept.any():
            raise InputError("no transition has a known next observation; record longer episodes")
        if kept.sum() == 1:
            raise InputError("there is one transition, which has no spread; record more of them")
        chosen = slice(None) if kept.all() else kept
        return cls(
            observations=torch.from_numpy(rows.observations[chosen]),
            actions=torch.from_numpy(actions[chosen]),
            rewards=torch.from_numpy(rows.rewards[chosen].copy()),
            next_observations=torch.from_numpy(rows.next_observations[chosen]),
            terminated=torch.from_numpy(rows.terminals[chosen].copy()),
            truncated=torch.from_numpy(rows.timeouts[chosen] & ~rows.terminals[chosen]),
            action_low=torch.from_numpy(low),
            action_high=torch.from_numpy(high),
            log=EpisodeLog(rows.rewards, rows.terminals, rows.timeouts, horizon),
            name=name,
            source=source,
            sha256=arrays_sha256(arrays) if sha256 is None else sha256,
            env_id=env_id,
            reference_returns=reference
            or reference_returns(name)
            or reference_returns(env_id or ""),
            notes=notes + remarks,
        )

    @property
    def observation_size(self) -> int:
        """d_o."""
        return self.observations.shape[1]

    @property
    def action_size(self) -> int:
        """d_a."""
        return self.actions.shape[1]

    def __len__(self) -> int:
        return len(self.rewards)

    def sample(self, n: int, *, generator: torch.Generator) -> Transitions:
        """n transitions, uniform with replacement, on the device of the data set."""
        row = torch.randint(len(self), (n,), generator=generator, device=generator.device)
        row = row.to(self.rewards.device)
        return Transitions(
            self.observations.index_select(0, row),
            self.actions.index_select(0, row),
            self.rewards.index_select(0, row),
            self.next_observations.index_select(0, row),
            self.terminated.index_select(0, row),
        )

    def episode_returns(self) -> Tensor:
        """Recorded, never scaled, undiscounted returns of whole episodes, float32 [episodes]."""
        return torch.from_numpy(self.log.returns[self.log.whole]).float()

    def with_rewards(self, rewards: Tensor) -> "TransitionDataset":
        """The same transitions with other rewards [n], say `rewards * return_scale(dataset)`."""
        if rewards.shape != self.rewards.shape:
            raise InputError(
                f"rewards have shape {tuple(rewards.shape)}, transitions are {len(self)}; give one "
                "value each"
            )
        return replace(self, rewards=rewards.to(self.rewards))

    def to(self, device: torch.device | str) -> "TransitionDataset":
        """The data set with all tensors on `device`."""
        tensors = {key: value for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{key: value.to(device) for key, value in tensors.items()})


def check_spaces(
    dataset: TransitionDataset, observation_space: spaces.Space, action_space: spaces.Space
) -> None:
    """InputError unless the environment's spaces (flattened) fit the data: sizes and action box."""
    size = spaces.flatdim(observation_space)
    if size != dataset.observation_size:
        raise InputError(
            f"the environment observes {size} numbers, data set {dataset.name!r} holds "
            f"{dataset.observation_size}; name the environment the data was recorded in (env_id)"
        )
    if not isinstance(action_space, spaces.Box) or action_space.shape != (dataset.action_size,):
        raise InputError(
            f"the environment takes actions from {action_space}, data set {dataset.name!r} holds "
            f"{dataset.action_size} continuous numbers; name the environment it was recorded in"
        )
    low, high = dataset.action_low.cpu().numpy(), dataset.action_high.cpu().numpy()
    if not np.allclose([action_space.low, action_space.high], [low, high], atol=ROUNDING):
        raise InputError(
            f"the environment's action box is {_interval(action_space.low, action_space.high)}, "
            f"data set {dataset.name!r} was read with {_interval(low, high)}; load it with the "
            "environment's box (action_box)"
        )


def arrays_sha256(arrays: Mapping[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes of the arrays, in order of the names."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _in_unit_box(
    actions: np.ndarray, box: tuple[Any, Any], clip: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """Actions rescaled from the box to [-1, 1], the box as [d_a] arrays, and remarks on it."""
    for edge in map(np.asarray, box):
        if edge.shape not in ((), actions.shape[1:]):
            raise InputError(
                f"the action box has {edge.size} coordinates, the data's actions"
                f" {actions.shape[1]}; name the environment they were recorded in (env_id), or"
                " give their box (action_box)"
            )
    low, high = (np.array(np.broadcast_to(edge, actions.shape[1:]), np.float32) for edge in box)
    if not (np.isfinite(low) & np.isfinite(high) & (low < high)).all():
        raise InputError(
            f"action box {_interval(low, high)} can't be rescaled to [-1, 1]; give finite low < "
            "high (action_box)"
        )
    remarks: tuple[str, ...] = ()
    if (low != -1).any() or (high != 1).any():
        actions = (actions - low) / (high - low) * 2 - 1
        remarks = (f"actions rescaled from {_interval(low, high)} to [-1, 1]",)
    outside = np.flatnonzero(np.abs(actions).max(axis=1) > 1)
    if not len(outside):
        return actions, low, high, remarks
    excess = float(np.abs(actions).max()) - 1
    if excess > ROUNDING and not clip:
        raise InputError(
            f"actions of {len(outside)} rows lie outside the box {_interval(low, high)}, by up to "
            f"{excess:.3g} of its half-width, the first in row {outside[0]}; pass "
            "clip_actions=True if the environment clipped them, or give the box they were recorded "
            "in (action_box)"
        )
    remarks += (
        f"actions of {len(outside)} rows clipped to the box {_interval(low, high)}, by up to "
        f"{excess:.3g} of its half-width",
    )
    return np.clip(actions, -1, 1), low, high, remarks


def _interval(low: np.ndarray, high: np.ndarray) -> str:
    if (low == low[0]).all() and (high == high[0]).all():
        return f"[{low[0]:g}, {high[0]:g}]"
    return f"[{low.tolist()}, {high.tolist()}]"


def data_facts(dataset: TransitionDataset) -> dict[str, Any]:
    """What a run must know of its data to be continued, or loaded without it."""
    return {
        "dataset": dataset.name,
        "data_sha256": dataset.sha256,
        "env_id": dataset.env_id,
        "reference_returns": dataset.reference_returns,
        "observation_size": dataset.observation_size,
        "action_size": dataset.action_size,
        "action_low": dataset.action_low.tolist(),
        "action_high": dataset.action_high.tolist(),
    }
