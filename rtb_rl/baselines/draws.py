"""What every training-free method returns, and the counting of what it cost."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtb_rl.core import Denoiser, LogReward, OnDemandLogProbs, conditions
from rtb_rl.core.protocols import Condition
from rtb_rl.core.rewards import checked_log_reward
from rtb_rl.errors import InputError
from rtb_rl.training.scoring import LOG_REWARD_FLOOR


@dataclass(frozen=True)
class Draws:
    """Delivered points and their price.

    `x0`: [rows, n, *event], without condition [n, *event]. `calls`: network forward passes spent
    for each delivered draw; a backward pass counts as two more. Where the method has them: `log_z`
    [rows], an estimate of log Z in nats, and `ess` [rows], the effective share of the weighted
    points that the draws were taken from, between 0 and 1; one row without condition. `source`,
    int64 [rows, n] or [n]: draws of one number hang together, being the same candidate again, or of
    one population; None: every draw is independent of the others.
    """

    x0: Tensor
    calls: float
    log_z: Tensor | None = None
    ess: Tensor | None = None
    source: Tensor | None = None

    def evidence(self) -> dict[str, float | None]:
        """Columns of a table, means over rows, where the draws have weights; else none of them."""
        if self.log_z is None or self.ess is None:
            return {}
        mean = {"log_z": float(self.log_z.mean()), "ess": float(self.ess.mean())}
        return {**mean, "log_z_error": None}

    def sources(self, rows: int) -> Sequence[Tensor | None]:
        """`source` of each row."""
        if self.source is None:
            return [None] * rows
        return list(self.source.reshape(rows, -1))


class CountedDenoiser:
    """A denoiser that counts its work: one call for each row, two more for each row of a backward
    pass through it.
    """

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.calls = denoiser, 0

    def __call__(self, x: Tensor, level: Tensor, condition: Condition) -> Any:
        prediction = self.denoiser(x, level, condition)
        if isinstance(prediction, OnDemandLogProbs):
            return self._counted(prediction)
        self.calls += len(x)
        first = prediction[0] if isinstance(prediction, tuple) else prediction
        if first.requires_grad:
            first.register_hook(self._count_backward)
        return prediction

    def _counted(self, prediction: OnDemandLogProbs) -> OnDemandLogProbs:
        """Of rows that are asked for alone."""

        def evaluate(chosen: Tensor) -> Tensor:
            self.calls += int(chosen.any(1).sum())
            return prediction[chosen]

        return OnDemandLogProbs(evaluate)

    def _count_backward(self, gradient: Tensor) -> None:
        self.calls += 2 * len(gradient)


def tempered(log_reward: LogReward, beta: float) -> LogReward:
    """beta log r, nats: [batch], float32 or better; minus infinity counts as the floor of training.

    Differentiable where log r is. InputError for a beta that isn't finite and for another shape
    than [batch], NonFiniteError for NaN or plus infinity.
    """
    if not math.isfinite(beta):
        raise InputError(f"beta is {beta}; give a finite number")

    def checked(x0: Tensor, condition: Condition) -> Tensor:
        values = checked_log_reward(log_reward(x0, condition), len(x0), "log_reward")
        return beta * values.clamp(min=LOG_REWARD_FLOOR)

    return checked


def check_count(name: str, value: int) -> None:
    """InputError for less than one."""
    if value < 1:
        raise InputError(f"{name} is {value}; give 1 or more")


def in_batches(function: Callable[..., Any], size: int) -> Callable[..., Any]:
    """`function(*tensors, condition)`, a Gaussian denoiser or a reward, that sees at most `size`
    rows at once; what it returns of them is put together.
    """

    def batched(*given: Any) -> Any:
        *tensors, condition = given
        parts, begin = [], 0
        for part, count in conditions.split(condition, len(tensors[0]), size):
            parts.append(function(*(rows[begin : begin + count] for rows in tensors), part))
            begin += count
        if isinstance(parts[0], tuple):  # a ScaledPrediction
            return type(parts[0])(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
        return torch.cat(parts)

    return batched


def as_rows(x0: Tensor, condition: Condition, n: int) -> Tensor:
    """Points [rows * n, *event] as `Draws.x0` has them."""
    return x0 if condition is None else x0.reshape(-1, n, *x0.shape[1:])
