"""Batches of conditions: None, a tensor, or a dict of tensors, handled alike."""

from collections.abc import Callable, Sequence

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


def move(condition: Condition, device: torch.device | str) -> Condition:
    """The condition on another device."""
    return apply(condition, lambda rows: rows.to(device))


def concatenate(conditions: Sequence[Condition]) -> Condition:
    """The rows of several conditions of one kind, one after another."""
    first = conditions[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat([c for c in conditions if isinstance(c, Tensor)])
    return {name: torch.cat([c[name] for c in conditions if isinstance(c, dict)]) for name in first}


def count(condition: Condition) -> int | None:
    """The number of rows; None for no condition."""
    if condition is None:
        return None
    rows = condition if isinstance(condition, Tensor) else next(iter(condition.values()))
    return rows.shape[0]


def interleave(parts: Sequence[Condition], rows: int) -> Condition:
    """Blocks of neighbours merged: parts[i] holds `rows` blocks, and so does the result.

    With blocks a1 a2 | a3 a4 and b1 | b2 (two rows) the result is a1 a2 b1 | a3 a4 b2.
    """
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return interleave_tensors([p for p in parts if isinstance(p, Tensor)], rows)
    return {
        name: interleave_tensors([p[name] for p in parts if isinstance(p, dict)], rows)
        for name in first
    }


def interleave_tensors(parts: Sequence[Tensor], rows: int) -> Tensor:
    """`interleave` for tensors [rows * block, ...]."""
    blocks = [part.reshape(rows, -1, *part.shape[1:]) for part in parts]
    return torch.cat(blocks, dim=1).flatten(0, 1)
