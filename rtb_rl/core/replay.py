"""Memory of final points: what a posterior has already found and been told the reward of."""

import math

import torch
from torch import Generator, Tensor

from rtb_rl.core import conditions
from rtb_rl.core.protocols import Condition
from rtb_rl.core.rewards import checked_log_reward


class SampleReplay:
    """The last `capacity` final points with their conditions and log-rewards.

    Drawn uniformly, or with probability proportional to r^tilt; uniformly too where every point is
    impossible, as where all have one floor. A drawn point becomes a path by
    `noise_back`, so nothing about the path it came from is kept. What is loaded goes to `device`.
    ValueError for a tilt below 0, which would draw what has no reward.
    """

    def __init__(self, capacity: int, *, tilt: float = 0.0, device: torch.device | str = "cpu"):
        if not 0 <= tilt < math.inf:
            raise ValueError(f"tilt is {tilt}; give 0, for uniform draws, or a positive number")
        self.tilt = tilt
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, not {capacity}")
        self.capacity, self.device = capacity, device
        self.x0: Tensor | None = None
        self.condition: Condition = None
        self.log_reward: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.x0 is None else len(self.x0)

    def add(self, x0: Tensor, condition: Condition, log_reward: Tensor) -> None:
        """Append rows; the oldest beyond the capacity are forgotten.

        ValueError for rows that don't go together, NonFiniteError for a log-reward that is NaN or
        plus infinity.
        """
        if log_reward.shape != (len(x0),) or conditions.count(condition) not in (None, len(x0)):
            raise ValueError(
                f"{len(x0)} points, {conditions.count(condition)} conditions and log-rewards"
                f" {tuple(log_reward.shape)} can't be stored together; give one of each a row"
            )
        checked_log_reward(log_reward, len(x0), "a log-reward for the replay")
        recent = slice(-self.capacity, None)
        if self.x0 is not None and self.log_reward is not None:
            x0 = torch.cat([self.x0, x0])
            condition = conditions.concatenate([self.condition, condition])
            log_reward = torch.cat([self.log_reward, log_reward])
        self.x0 = x0[recent].detach()
        self.condition = conditions.take(condition, recent)
        self.log_reward = log_reward[recent].detach()

    def sample(self, count: int, *, generator: Generator) -> tuple[Tensor, Condition, Tensor]:
        """`count` rows with replacement: final points, conditions, log-rewards."""
        if self.x0 is None or self.log_reward is None:
            raise ValueError("nothing has been added to the replay yet")
        device = self.x0.device
        if self.tilt == 0:
            index = torch.randint(len(self.x0), (count,), generator=generator, device=device)
        else:
            cumulative = (self.tilt * self.log_reward.double()).softmax(0).cumsum(0)
            if bool(cumulative[-1].isnan()):  # every log-reward is minus infinity
                cumulative = torch.ones_like(cumulative).cumsum(0) / len(cumulative)
            uniform = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
            index = torch.searchsorted(cumulative, uniform).clamp(max=len(self.x0) - 1)
        return self.x0[index], conditions.take(self.condition, index), self.log_reward[index]

    def state_dict(self) -> dict:
        return {"x0": self.x0, "condition": self.condition, "log_reward": self.log_reward}

    def load_state_dict(self, state_dict: dict) -> None:
        x0, log_reward = state_dict["x0"], state_dict["log_reward"]
        self.x0 = None if x0 is None else x0.to(self.device)
        self.log_reward = None if log_reward is None else log_reward.to(self.device)
        self.condition = conditions.move(state_dict["condition"], self.device)
