"""Batches of conditions: None, a tensor, or a dict of tensors, handled alike."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rtb_rl.core.protocols import Condition


def apply(condition: Condition, function: Callable[[Tensor], Tensor]) -> Condition:
    """The condition with `function` applied to each of its tensors."""
    if condition is None:
        return None
    if isinstance(condition, Tensor):
        return function(condition)
    return {name: function(value) for name, value in condition.items()}


def repeat(condition: Condition, times: int) -> Condition:
    """Each row `times` times, copies of a row next to each other."""
    return apply(condition, lambda rows: rows.repeat_interleave(times, dim=0))


def take(condition: Condition, index: Tensor | slice) -> Condition:
    """The rows at `index`."""
    return apply(condition, lambda rows: rows[index])


def split(condition: Condition, rows: int, size: int | None) -> Iterator[tuple[Condition, int]]:
    """The `rows` rows in turn, at most `size` at a time (None: all), each part with its count.

    ValueError for a condition of another number of rows.
    """
    check_rows(condition, rows)
    size = size or max(1, rows)
    for begin in range(0, rows, size):
        end = min(begin + size, rows)
        yield take(condition, slice(begin, end)), end - begin


def move(condition: Condition, device: torch.device | str) -> Condition:
    """The condition on another device."""
    return apply(condition, lambda rows: rows.to(device))


def concatenate(conditions: Sequence[Condition]) -> Condition:
    """The rows of several conditions of one kind, one after another. TypeError for several
    kinds.
    """
    return _merge(conditions, torch.cat)


def count(condition: Condition) -> int | None:
    """The number of rows; None for no condition."""
    if condition is None:
        return None
    rows = condition if isinstance(condition, Tensor) else next(iter(condition.values()))
    return rows.shape[0]


def check_rows(condition: Condition, rows: int) -> None:
    """ValueError unless every tensor of the condition has this many rows."""
    tensors = condition if isinstance(condition, dict) else {"condition": condition}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[0] != rows:
            raise ValueError(
                f"{name!r} has {tensor.shape[0]} rows for {rows} paths; give one row a path, or"
                " repeat the rows with conditions.repeat"
            )


def interleave(parts: Sequence[Condition], rows: int) -> Condition:
    """Blocks of neighbours merged: parts[i] holds `rows` blocks, and so does the result.

    With blocks a1 a2 | a3 a4 and b1 | b2 (two rows) the result is a1 a2 b1 | a3 a4 b2.
    """
    return _merge(parts, lambda tensors: interleave_tensors(tensors, rows))


def interleave_tensors(parts: Sequence[Tensor], rows: int) -> Tensor:
    """`interleave` for tensors [rows * block, ...]."""
    blocks = [part.reshape(rows, -1, *part.shape[1:]) for part in parts]
    return torch.cat(blocks, dim=1).flatten(0, 1)


def _merge(conditions: Sequence[Condition], merge: Callable[[list[Tensor]], Tensor]) -> Condition:
    tensors = [c for c in conditions if isinstance(c, Tensor)]
    tables = [c for c in conditions if isinstance(c, dict)]
    if len(tensors) == len(conditions):
        return merge(tensors)
    if len(tables) == len(conditions) and len({frozenset(table) for table in tables}) == 1:
        return {name: merge([table[name] for table in tables]) for name in tables[0]}
    if any(c is not None for c in conditions):
        kinds = ", ".join(
            f"dict of {sorted(c)}" if isinstance(c, dict) else type(c).__name__ for c in conditions
        )
        raise TypeError(f"conditions of one batch must be of one kind, not {kinds}")
    return None
