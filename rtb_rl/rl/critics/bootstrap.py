"""What all learners of Q do: a target that bootstraps, and a slow copy that follows."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from rtb_rl.rl.data.dataset import Transitions


def bootstrapped(batch: "Transitions", next_value: Tensor, discount: float) -> Tensor:
    """reward + discount * next_value, the latter 0 after a terminal step and not after a cut one.

    All [batch].
    """
    return batch.rewards + discount * next_value.masked_fill(batch.terminated, 0.0)


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, polyak: float) -> None:
    """Move the parameters of `target` by the fraction `polyak` towards those of `source`."""
    for slow, parameter in zip(target.parameters(), source.parameters(), strict=True):
        slow.lerp_(parameter, polyak)
