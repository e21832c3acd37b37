"""The relative trajectory balance objective and what its residuals say about the posterior.

All functions take and return one number per path, in nats. arXiv 2405.20971, eq. 8 and section 2.2.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from rtb_rl.core.protocols import Condition, Denoiser, Diffusion, Objective
from rtb_rl.core.trajectory import Trajectory, steps_in_chunks

Penalty = Callable[[Tensor], Tensor]

Control = Callable[[Any, Tensor, Condition, Tensor], Tensor]
"""(prediction, level, condition, path) of some steps -> a guess of their weights: [rows]."""


def log_weight(log_reward: Tensor, log_ratio: Tensor, beta: float) -> Tensor:
    """beta log r - (log p_post - log p_prior): a one-path estimate of log Z.

    ValueError for rewards and ratios of different shapes; either may be a single number.
    """
    check_same_paths(log_reward, log_ratio)
    return beta * log_reward - log_ratio


def residual(log_z: Tensor, log_weight: Tensor) -> Tensor:
    """log Z - log_weight: zero on every path exactly when the posterior is right.

    ValueError for a log Z that is neither one a path nor shared by several, as [rows, 1] is by the
    paths [rows, n] of a row.
    """
    if not _spreads_to(log_z.shape, log_weight.shape):
        raise ValueError(
            f"log Z {tuple(log_z.shape)} and log-weights {tuple(log_weight.shape)} don't fit: give"
            f" one log Z a path, shape {tuple(log_weight.shape)}, or a single number"
        )
    return log_z - log_weight


def check_same_paths(log_reward: Tensor, log_ratio: Tensor) -> None:
    """ValueError for log-rewards and log-ratios that aren't one a path of the same paths.

    [n, 1] against [n] would be [n, n], every reward with every path, and train nothing.
    """
    if log_reward.shape != log_ratio.shape and log_reward.ndim and log_ratio.ndim:
        raise ValueError(
            f"log-rewards {tuple(log_reward.shape)} and log-ratios {tuple(log_ratio.shape)} aren't"
            " of the same paths: give one number a path in both, as log_reward.squeeze(-1) is of"
            " a column"
        )


def _spreads_to(shape: torch.Size, wanted: torch.Size) -> bool:
    """Whether a tensor of this shape is broadcast to that one, which stays as it is."""
    given = shape[::-1]
    return len(given) <= len(wanted) and all(
        one in (1, other) for one, other in zip(given, wanted[::-1], strict=False)
    )


def square(residual: Tensor) -> Tensor:
    """residual^2."""
    return residual.square()


def huber(threshold: float) -> Penalty:
    """residual^2 up to the threshold, then linear with the same slope. ValueError for a threshold
    that isn't positive.
    """
    _check_positive(threshold, "the Huber threshold")

    def penalty(residual: Tensor) -> Tensor:
        return 2 * torch.nn.functional.huber_loss(
            residual, torch.zeros_like(residual), reduction="none", delta=threshold
        )

    return penalty


def linex(limit: float) -> Penalty:
    """2 (exp(-residual) + residual - 1), linear once -residual exceeds `limit`.

    On-policy its gradient is that of twice KL(target | posterior), while squares give twice
    KL(posterior | target): it covers every mode, is linear where a path has too much weight, and
    its best log Z is the importance-weighted one. With few levels, where no posterior is exact, its
    optimum has the moments and mode weights of the target. arXiv 2410.02596. ValueError for a limit
    that isn't positive, with which too much weight would be asked for more, or nothing.
    """
    _check_positive(limit, "the linex limit")

    def penalty(residual: Tensor) -> Tensor:
        excess = -residual
        bounded = excess.clamp(max=limit)
        return 2 * (bounded.exp() * (1 + excess - bounded) - excess - 1)

    return penalty


def _check_positive(value: float, name: str) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; give a positive number of nats")


def penalty_of(huber_threshold: float | None, linex_limit: float | None) -> Penalty:
    """Huber, linex, or the sum of both; squares where neither is given.

    On-policy the sum descends KL(posterior | target) and KL(target | posterior) at once: the first
    alone loses modes that it should keep, the second is slow to leave those that it should lose.
    """
    penalties = [
        make(value)
        for make, value in ((huber, huber_threshold), (linex, linex_limit))
        if value is not None
    ]
    if not penalties:
        return square
    return lambda residual: torch.stack([penalty(residual) for penalty in penalties]).sum(0)


def rtb_loss(residual: Tensor, penalty: Penalty = square) -> Tensor:
    """The mean penalty of the residuals; a scalar."""
    return penalty(residual).mean()


def random_levels(
    levels: int, count: int, batch: int, *, first: int = 1, generator: Generator
) -> Tensor:
    """`count` different levels of first..levels for each path, uniformly: int64 [count, batch]."""
    every = levels - first + 1
    if not 1 <= count <= every:
        raise ValueError(f"can't draw {count} different levels out of {every}")
    order = torch.rand((every, batch), generator=generator, device=generator.device).argsort(0)
    return order[:count] + first


def backward_in_chunks(
    diffusion: Diffusion,
    posterior: Denoiser,
    trajectory: Trajectory,
    weight: Tensor,
    *,
    levels: Tensor | None = None,
    first: int = 1,
    chunk: int | None = None,
    control: Control | None = None,
) -> None:
    """Add sum_paths weight * grad log p_post(path) to the gradients of the posterior's parameters.

    `weight` [batch] is d loss / d log_ratio, computed without a graph; since the states of a path
    are constants and the prior is frozen, this is the whole gradient. `levels` [count, batch] takes
    a random subset of the steps of each path and scales by K / count (unbiased). Steps at levels
    below `first` are known to have no gradient: the subset is then of first..K, scaled by that
    many. Memory grows with `chunk` rows, not with K.

    `control` guesses the weight of a path from x[k] and what the posterior predicts there; the
    guess is taken from the weight of that step. Since E[grad log p_post(x[k-1] | x[k])] = 0, no
    guess biases the gradient of paths drawn from the posterior, and a good one takes noise away;
    for other paths it must be zero.
    """
    if levels is None:
        every = torch.arange(first, trajectory.levels + 1, device=weight.device)
        levels = every[:, None].expand(-1, len(weight))
    scale = (trajectory.levels - first + 1) / levels.shape[0]
    weight = weight.detach()
    for x_before, x, level, condition, path in steps_in_chunks(trajectory, levels, chunk):
        prediction = posterior(x, level, condition)
        kernel = diffusion.kernel(prediction, x, level)
        rows = weight[path]
        if control is not None:
            with torch.no_grad():
                rows = rows - control(prediction, level, condition, path)
        loss = (scale * rows * kernel.log_prob(x_before)).sum()
        if loss.requires_grad:  # not where no step of a chunk asks the posterior anything
            loss.backward()


def rtb(penalty: Penalty = square) -> Objective:
    """Relative trajectory balance as an objective for fine-tuning."""

    def objective(log_z: Tensor, log_ratio: Tensor, log_reward: Tensor, beta: float) -> Tensor:
        return rtb_loss(residual(log_z, log_weight(log_reward, log_ratio, beta)), penalty)

    return objective


def elbo(log_weight: Tensor) -> Tensor:
    """Mean log-weight of paths drawn from the posterior: at most log Z. Reduces the last axis."""
    return log_weight.mean(-1)


def eubo(log_weight: Tensor) -> Tensor:
    """Mean log-weight of paths drawn from the exact target: at least log Z. Reduces the last axis.

    log Z plus KL(target paths | posterior paths). Exact target paths are prior paths reweighted by
    r^beta; noised exact draws of the target are such paths where the prior reverses the noising.
    """
    return log_weight.mean(-1)


def importance_eubo(log_weight: Tensor) -> Tensor:
    """`eubo` from posterior paths with importance weights: an estimate, not a bound.

    With few effective paths it is too low, since what the posterior misses is not seen.
    """
    return (log_weight.softmax(-1) * log_weight).sum(-1)


def importance_log_z(log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """log mean exp(log_weight) over posterior paths (last axis), and its standard error.

    Consistent for log Z; the standard error is that of the mean weight, by the delta method.
    """
    count = log_weight.shape[-1]
    log_z = log_weight.logsumexp(-1) - math.log(count)
    relative = (log_weight - log_z.unsqueeze(-1)).exp()
    return log_z, relative.std(-1) / math.sqrt(count)


def effective_sample_size(log_weight: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2) of the importance weights along the last axis, between 1 / n and
    1.
    """
    count = log_weight.shape[-1]
    return (2 * log_weight.logsumexp(-1) - (2 * log_weight).logsumexp(-1)).exp() / count
