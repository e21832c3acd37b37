"""Log-rewards of final points, checked: what a black box may return and what it may not."""

import torch
from torch import Tensor

from rtb_rl.core.protocols import Condition
from rtb_rl.core.rewards import checked_log_reward
from rtb_rl.training.task import Task

LOG_REWARD_FLOOR = -1e6
"""The least that a log-reward counts, minus infinity first of all; nats."""


@torch.no_grad()
def score(
    task: Task, x0: Tensor, condition: Condition, *, floor: float = LOG_REWARD_FLOOR
) -> tuple[Tensor, int]:
    """log r of each point, [batch] in float32 or better, and how many were below the floor, as
    minus infinity is, and got the floor instead.

    Finite ones as well, so that no impossible point is worth more than a possible one; what is
    above the floor is possible. InputError for another shape than [batch], NonFiniteError for NaN
    or plus infinity.
    """
    found = task.log_reward(x0, condition)
    log_reward = checked_log_reward(found, len(x0), f"log_reward of task {task.name!r}")
    return log_reward.clamp(min=floor), int((log_reward < floor).sum())
