"""What a state is worth by the Q of some actions of the behaviour prior, and of several Qs."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Backup = Callable[[Tensor], Tensor]
"""Q of M candidates, [..., M] -> value of the state, [...]."""

Bound = Callable[[Tensor], Tensor]
"""Q of the members, [members, ...] -> what counts of them, [...]."""


def soft_value(beta: float) -> Backup:
    """(1 / beta) log mean_i exp(beta Q_i): the estimate of log Z / beta from draws of the prior.

    The mean of Q at beta = 0, the largest as beta grows. By Jensen it is too small on average, the
    more so the larger beta and the fewer candidates.
    """
    if beta == 0:
        return lambda q: q.mean(-1)
    return lambda q: ((beta * q).logsumexp(-1) - math.log(q.shape[-1])) / beta


def softmax_value(beta: float) -> Backup:
    """sum_i softmax(beta Q)_i Q_i: the mean of Q under the policy prior exp(beta Q) / Z."""
    return lambda q: ((beta * q).softmax(-1) * q).sum(-1)


BACKUPS: dict[str, Callable[[float], Backup]] = {"soft": soft_value, "softmax": softmax_value}


def least(q: Tensor) -> Tensor:
    """min over members."""
    return q.amin(0)


def mean_minus_std(rho: float) -> Bound:
    """mean - rho std over members, the std with the number of members below the root."""

    def bound(q: Tensor) -> Tensor:
        std, mean = torch.std_mean(q, dim=0, correction=0)
        return mean - rho * std

    return bound
