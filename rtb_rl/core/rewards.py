"""What a black-box reward may return, and what it may not."""

import torch
from torch import Tensor

from rtb_rl.errors import InputError, NonFiniteError


def checked_log_reward(log_reward: object, points: int, name: str) -> Tensor:
    """log r of `points` points, as `name` returned it: [points], float32 or better; minus infinity
    where a point is impossible.

    InputError for another shape, NonFiniteError for NaN or plus infinity.
    """
    if not isinstance(log_reward, Tensor) or log_reward.shape != (points,):
        is_tensor = isinstance(log_reward, Tensor)
        shape = tuple(log_reward.shape) if is_tensor else type(log_reward).__name__
        raise InputError(
            f"{name} returned {shape} for {points} points; return one number a point, shape"
            f" ({points},)"
        )
    bad = log_reward.isnan() | (log_reward == torch.inf)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise NonFiniteError(
            f"{name} is {float(log_reward[first])} at point {first}, and NaN or +inf at"
            f" {int(bad.sum())} of {points} points; return finite log r in nats, or -inf where a"
            " point is impossible"
        )
    return log_reward.to(torch.promote_types(log_reward.dtype, torch.float32))
