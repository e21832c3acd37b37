"""The environment's action box, onto which [-1, 1] is mapped."""

from torch import Tensor


def to_box(action: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Actions [..., d_a] in [-1, 1] in the units of a box from `low` to `high`, [d_a]."""
    return low + (action + 1) * ((high - low) / 2)
