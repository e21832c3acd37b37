"""Arrays of recorded experience, checked: missing, misshapen or not finite ones are refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rtb_rl.errors import InputError

KEYS: tuple[str, ...] = ("observations", "actions", "rewards", "terminals", "timeouts")
OTHER_NAMES = {
    "terminated": "terminals",
    "terminations": "terminals",
    "truncated": "timeouts",
    "truncations": "timeouts",
}
FINAL = "infos/final_observations"


@dataclass(frozen=True, eq=False)
class Rows:
    """Every recorded row, checked: float32 [rows, ...], flags bool [rows].

    Where the successor is not `known`, `next_observations` repeats the row's own observation.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminals: np.ndarray
    timeouts: np.ndarray
    next_observations: np.ndarray
    known: np.ndarray


def check_rows(arrays: Mapping[str, Any]) -> Rows:
    """Rows of these arrays; an InputError names the key, what it holds and should, the cure."""
    found = {OTHER_NAMES[key]: arrays[key] for key in OTHER_NAMES if key in arrays} | dict(arrays)
    missing = [key for key in KEYS if key not in found]
    if missing:
        raise InputError(
            f"missing {', '.join(map(repr, missing))}; found {', '.join(sorted(arrays)) or '-'}; "
            f"give the keys {', '.join(KEYS)} ('timeouts' all False where no episode was cut)"
        )
    if np.asarray(found["actions"]).dtype.kind != "f":
        raise InputError(
            f"'actions' holds {np.asarray(found['actions']).dtype}; only continuous actions "
            "(floats) are supported"
        )
    observations, actions = (_table(found[key], key) for key in ("observations", "actions"))
    rewards = _column(_numbers(found["rewards"], "rewards"), "rewards")
    terminals, timeouts = (_flags(found[key], key) for key in ("terminals", "timeouts"))
    columns = dict(zip(KEYS, (observations, actions, rewards, terminals, timeouts), strict=True))
    if "next_observations" in found:
        columns["next_observations"] = _table(found["next_observations"], "next_observations")
    _check_lengths(columns)
    if "next_observations" in columns:
        _same_width(columns["next_observations"], observations, "next_observations")
        return Rows(**columns, known=_recorded(columns, terminals | timeouts))
    following, known = _successors(observations, terminals | timeouts, found.get(FINAL))
    return Rows(**columns, next_observations=following, known=known)


def _check_lengths(columns: Mapping[str, np.ndarray]) -> None:
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1:
        counted = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise InputError(f"arrays differ in length: {counted}; every key needs one row a step")
    if not lengths["rewards"]:
        raise InputError("there are no transitions: all arrays have 0 rows; record an episode")
    if not (columns["terminals"] | columns["timeouts"]).any():
        raise InputError(
            f"no episode ends in {lengths['rewards']} rows: 'terminals' and 'timeouts' are False "
            "throughout; set 'terminals' where the environment ended, 'timeouts' where it was cut"
        )


def _successors(
    observations: np.ndarray, ends: np.ndarray, final: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Next observation of every row and whether it is known: row i + 1 inside an episode."""
    last = np.flatnonzero(ends)
    if not ends[-1]:
        last = np.append(last, len(ends) - 1)
    following = np.concatenate([observations[1:], observations[-1:]])
    following[last] = observations[last]
    known = np.ones(len(ends), dtype=bool)
    known[last] = False
    if final is not None:
        final = _table(final, FINAL)
        _same_width(final, observations, FINAL)
        if len(final) not in {len(last), int(ends.sum())}:
            raise InputError(
                f"'{FINAL}' has {len(final)} rows for {len(last)} episodes; give one an episode"
            )
        following[last[: len(final)]] = final
        known[last[: len(final)]] = True
    return following, known


def _recorded(columns: Mapping[str, np.ndarray], ends: np.ndarray) -> np.ndarray:
    """Which of the given next observations may be so: [rows].

    Where each cut row's is the start of the next episode they were made by shifting the
    observations up, and say nothing about the ends; the last row's then is the first observation.
    """
    given = columns["next_observations"]
    observations = columns["observations"]
    moved = (given != observations).any(1)  # where nothing moves, every shift is right
    shifted = (given == np.roll(observations, -1, axis=0)).all(1)
    last = np.arange(len(ends)) == len(ends) - 1
    cut = ends & ~columns["terminals"]
    inner = cut & ~last
    made = bool(moved[inner].any() and shifted[inner].all())
    return ~((inner & made) | (last & moved & shifted & ~columns["terminals"]))


def _numbers(values: Any, key: str) -> np.ndarray:
    given = np.asarray(values)
    if given.dtype.kind not in "fiub":
        raise InputError(f"'{key}' holds {given.dtype}, not numbers; give float32 values")
    array = np.array(given, dtype=np.float32)
    finite = np.isfinite(array)
    if not finite.all():
        bad = np.unique(np.nonzero(~finite)[0])
        raise InputError(
            f"'{key}' holds NaN or infinite values in {len(bad)} rows, the first is row {bad[0]}; "
            "values must be finite in float32: remove those episodes or record them again"
        )
    return array


def _table(values: Any, key: str) -> np.ndarray:
    table = _numbers(values, key)
    if table.ndim != 2 or table.shape[1] == 0:
        raise InputError(f"'{key}' has shape {table.shape}, not [rows, numbers]; flatten each row")
    return table


def _column(array: np.ndarray, key: str) -> np.ndarray:
    if array.ndim != 1 and (array.ndim != 2 or array.shape[1] != 1):
        raise InputError(f"'{key}' has shape {array.shape}; give one value a row, [rows]")
    return array.reshape(-1)


def _flags(values: Any, key: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype != bool and not np.isin(array, (0, 1)).all():
        raise InputError(f"'{key}' ({array.dtype}) holds values other than 0 and 1; give booleans")
    return _column(np.array(array, dtype=bool), key)


def _same_width(other: np.ndarray, observations: np.ndarray, key: str) -> None:
    if other.shape[1] != observations.shape[1]:
        raise InputError(
            f"'{key}' has {other.shape[1]} numbers a row, 'observations' "
            f"{observations.shape[1]}; they must agree"
        )
