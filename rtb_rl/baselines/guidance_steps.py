"""How far a guided step is moved along the gradient of a likelihood."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtb_rl.core import GaussianKernel
from rtb_rl.errors import InputError

ROUNDING = 1e-4
"""Of a log-likelihood of about one nat; of more nats in proportion."""


@dataclass(frozen=True)
class Guidance:
    """What a denoiser predicts at x, the log-likelihood [batch] of that, nats, and its gradient in
    x [batch, *event]. Without graph. `maximum`: the largest log-likelihood that there could be,
    [batch] or one number.
    """

    prediction: Any
    log_likelihood: Tensor
    gradient: Tensor
    maximum: Tensor | float = 0.0


GuidanceStep = Callable[[Guidance, GaussianKernel], Tensor]
"""What is added to a draw of the prior's kernel: [batch, *event]."""


def likelihood_step(strength: float) -> GuidanceStep:
    """strength * grad log r."""
    return lambda guidance, kernel: strength * guidance.gradient


def normalised_step(strength: float) -> GuidanceStep:
    """strength * grad log r / sqrt(2 (max log r - log r)), for each sample by itself.

    With log r = -|y - A x0|^2 / (2 sigma^2) + constant this is -(strength / sigma) grad |y - A x0|,
    the step of the published code of arXiv 2209.14687 with zeta = strength / sigma (0.3 to 1); its
    algorithm 1 says zeta' / |y - A x0| on the gradient of |y - A x0|^2, where zeta' = zeta / 2.
    There the norm runs over the whole batch, so that the step depends on the batch size; here it
    does not. The maximum, which a normalised density has above 0 or below, is what the reward says
    in `maximum(condition)`, nats; of one that says nothing it is 0. InputError where log r is
    larger.
    """

    def step(guidance: Guidance, kernel: GaussianKernel) -> Tensor:
        log_likelihood = guidance.log_likelihood
        maximum = torch.as_tensor(guidance.maximum, dtype=torch.float64).to(log_likelihood)
        gap = maximum - log_likelihood
        if bool((gap < -ROUNDING * (1 + maximum.abs())).any()):
            worst = int(gap.argmin())
            raise InputError(
                "normalised_step reads 2 (maximum - log r) as a squared residual, but log r reaches"
                f" {float(log_likelihood[worst]):.3g} and its maximum is said to be"
                f" {float(maximum.expand_as(gap)[worst]):.3g}; give the reward a method"
                " maximum(condition) that returns the largest log r, or use posterior_mean_step"
            )
        norm = (2 * gap).clamp(min=1e-12).sqrt()
        return strength * guidance.gradient / _like_events(norm, guidance.gradient)

    return step


def posterior_mean_step(guidance: Guidance, kernel: GaussianKernel) -> Tensor:
    """std^2 * grad log r: the shift of the step's mean to first order (arXiv 2105.05233,
    algorithm 1); needs no strength, and is exact for a linear log r as steps become small.
    """
    return kernel.std.square() * guidance.gradient


def _like_events(values: Tensor, x: Tensor) -> Tensor:
    """[batch] with an axis of one for each event axis of x."""
    return values.reshape(-1, *(1,) * (x.ndim - 1))
