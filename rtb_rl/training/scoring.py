"""Log-rewards of final points, checked: what a black box may return and what it may not."""

import torch
from torch import Tensor

from rtb_rl.core.protocols import Condition
from rtb_rl.core.rewards import checked_log_reward
from rtb_rl.training.task import Task

LOG_REWARD_FLOOR = -1e6
"""Stands in for a log-reward of minus infinity, nats."""


@torch.no_grad()
def score(
    task: Task, x0: Tensor, condition: Condition, *, floor: float = LOG_REWARD_FLOOR
) -> tuple[Tensor, int]:
    """log r of each point, [batch] in float32 or better, and how many were minus infinity and got
    the floor instead.

    InputError for another shape than [batch], NonFiniteError for NaN or plus infinity.
    """
    found = task.log_reward(x0, condition)
    log_reward = checked_log_reward(found, len(x0), f"log_reward of task {task.name!r}")
    impossible = log_reward == -torch.inf
    return torch.where(impossible, floor, log_reward), int(impossible.sum())
