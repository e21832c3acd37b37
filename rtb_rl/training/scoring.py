"""Log-rewards of final points, checked: what a black box may return and what it may not."""

import torch
from torch import Tensor

from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError, NonFiniteError
from rtb_rl.training.task import Task

LOG_REWARD_FLOOR = -1e6
"""Stands in for a log-reward of minus infinity, nats."""


@torch.no_grad()
def score(
    task: Task, x0: Tensor, condition: Condition, *, floor: float = LOG_REWARD_FLOOR
) -> tuple[Tensor, int]:
    """log r of each point, [batch], and how many were minus infinity and got the floor instead.

    InputError for another shape than [batch], NonFiniteError for NaN or plus infinity.
    """
    log_reward = task.log_reward(x0, condition)
    if not isinstance(log_reward, Tensor) or log_reward.shape != (len(x0),):
        is_tensor = isinstance(log_reward, Tensor)
        shape = tuple(log_reward.shape) if is_tensor else type(log_reward).__name__
        raise InputError(
            f"log_reward of task {task.name!r} returned {shape} for {len(x0)} points; return one"
            f" number a point, shape ({len(x0)},)"
        )
    bad = log_reward.isnan() | (log_reward == torch.inf)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise NonFiniteError(
            f"log_reward of task {task.name!r} is {float(log_reward[first])} at point {first}, and"
            f" NaN or +inf at {int(bad.sum())} of {len(x0)} points; return finite log r in nats,"
            " or -inf where a point is impossible"
        )
    impossible = log_reward == -torch.inf
    return torch.where(impossible, floor, log_reward), int(impossible.sum())
