"""Guidance: each step of the prior is shifted along the gradient of a likelihood of x0.

The likelihood of a noisy point is that of the clean point predicted from it, which is biased at
high noise; none of these methods samples prior * r^beta / Z exactly, and none estimates log Z.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor

from rtb_rl.baselines.draws import CountedDenoiser, Draws, as_rows, check_count, tempered
from rtb_rl.baselines.guidance_steps import (
    Guidance,
    GuidanceStep,
    likelihood_step,
    posterior_mean_step,
)
from rtb_rl.core import (
    Denoiser,
    GaussianDiffusion,
    LogReward,
    ScaledPrediction,
    conditions,
)
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError

BATCH = 1000
"""Rows whose gradients are taken together."""

Likelihood = Callable[[Tensor, Tensor, Condition], Tensor]
"""(predicted x0 [batch, *event], level [batch], condition) -> log-likelihood, nats: [batch]."""


Maximum = Callable[[Condition], Tensor | float]
"""condition -> the largest log-likelihood that any x0 could have, nats: [batch], or one number."""


def look_ahead(
    denoiser: Denoiser, likelihood: Likelihood, x: Tensor, level: Tensor, condition: Condition
) -> Guidance:
    """The prediction at x, its log-likelihood, and the gradient of that through the denoiser.

    InputError for a likelihood that passes no gradient to x0.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        prediction = denoiser(x, level, condition)
        scaled = isinstance(prediction, ScaledPrediction)
        log_likelihood = likelihood(prediction.x0 if scaled else prediction, level, condition)
        if not log_likelihood.requires_grad:
            raise InputError(
                "log_reward passes no gradient to x0, or the denoiser none to x; guidance needs"
                " both, fk_steering and best_of_n need neither"
            )
        (gradient,) = torch.autograd.grad(log_likelihood.sum(), x)
    if scaled:
        prediction = ScaledPrediction(*(part.detach() for part in prediction))
    else:
        prediction = prediction.detach()
    return Guidance(prediction, log_likelihood.detach(), gradient)


def look_ahead_in_batches(
    denoiser: Denoiser, likelihood: Likelihood, x: Tensor, level: Tensor, condition: Condition
) -> Guidance:
    """`look_ahead`, BATCH rows at a time: memory does not grow with the rows. For likelihoods that
    take each row by itself.
    """
    found = [
        look_ahead(denoiser, likelihood, x[rows], level[rows], conditions.take(condition, rows))
        for rows in (slice(begin, begin + BATCH) for begin in range(0, len(x), BATCH))
    ]
    predictions = [one.prediction for one in found]
    scaled = isinstance(predictions[0], ScaledPrediction)
    return Guidance(
        ScaledPrediction(*map(torch.cat, zip(*predictions))) if scaled else torch.cat(predictions),
        torch.cat([one.log_likelihood for one in found]),
        torch.cat([one.gradient for one in found]),
    )


def point_likelihood(log_reward: LogReward, beta: float) -> Likelihood:
    """beta log r at the predicted x0."""
    reward = tempered(log_reward, beta)
    return lambda x0, level, condition: reward(x0, condition)


def point_maximum(log_reward: LogReward, beta: float) -> Maximum:
    """beta times what `log_reward.maximum(condition)` says, where it has one, or zero: of means of
    r^beta as well.
    """
    maximum = getattr(log_reward, "maximum", None)
    return lambda condition: 0.0 if maximum is None else beta * maximum(condition)


def smoothed_likelihood(
    diffusion: GaussianDiffusion,
    log_reward: LogReward,
    beta: float,
    particles: int,
    *,
    generator: Generator,
) -> Likelihood:
    """log mean_i r(x0 + noise[level] eps_i)^beta over `particles` draws of eps_i ~ N(0, I).

    noise = sqrt(1 - signal^2) is the published width sigma / sqrt(1 + sigma^2) for sigma = noise /
    signal. Being the log of a mean, its gradient weighs each particle by its likelihood.
    """
    reward = tempered(log_reward, beta)

    def likelihood(x0: Tensor, level: Tensor, condition: Condition) -> Tensor:
        shape = (len(x0), particles, *x0.shape[1:])
        eps = torch.randn(shape, generator=generator, device=x0.device, dtype=x0.dtype)
        around = x0[:, None] + diffusion.noise[level].to(x0.dtype)[:, None] * eps
        each = conditions.repeat(condition, particles)
        values = reward(around.flatten(0, 1), each).reshape(len(x0), particles)
        return values.logsumexp(1) - math.log(particles)

    return likelihood


def dps(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    log_reward: LogReward,
    condition: Condition,
    n: int,
    *,
    beta: float = 1.0,
    step: GuidanceStep = posterior_mean_step,
    generator: Generator,
) -> Draws:
    """Diffusion posterior sampling: guided by r^beta at the predicted x0 (arXiv 2209.14687).

    3 K calls a draw, and K gradients of log r, which must be differentiable. A draw depends on its
    own row only.
    """
    likelihood, maximum = point_likelihood(log_reward, beta), point_maximum(log_reward, beta)
    return _guided(
        diffusion, denoiser, likelihood, condition, n, step, maximum, generator=generator
    )


def lgd_mc(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    log_reward: LogReward,
    condition: Condition,
    n: int,
    *,
    beta: float = 1.0,
    step: GuidanceStep = posterior_mean_step,
    particles: int = 10,
    generator: Generator,
) -> Draws:
    """Loss-guided diffusion: guided by the mean of r^beta around the predicted x0 (Song et al.,
    ICML 2023, "Loss-guided diffusion models for plug-and-play controllable generation").

    3 K calls a draw: all `particles` share one backward pass through the network. K * particles
    gradients of log r.
    """
    check_count("particles", particles)
    likelihood = smoothed_likelihood(diffusion, log_reward, beta, particles, generator=generator)
    maximum = point_maximum(log_reward, beta)
    return _guided(
        diffusion, denoiser, likelihood, condition, n, step, maximum, generator=generator
    )


def noised_logits_guidance(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    logits: Callable[[Tensor, Condition], Tensor],
    condition: Condition,
    n: int,
    *,
    classes: Sequence[int],
    strength: float = 0.1,
    generator: Generator,
) -> Draws:
    """What the published code of arXiv 2405.20971 runs as DPS; for comparison only, use `dps`.

    The guidance is minus the gradient of |target - logits(predicted x0)|, both noised to the level,
    where `target` is one at the wanted `classes` and zero elsewhere, and `logits` (x0, condition)
    -> [batch, number of classes] are a classifier's before its softmax. It is weak: logits are
    drawn to 0 and 1, no confident prediction but odds of e to 1; both are noised by the same draw,
    which cancels and leaves the signal as a factor; and the norm runs over the whole batch, so that
    a step shrinks as the batch grows and depends on the other rows. 3 K calls a draw.
    """

    def likelihood(x0: Tensor, level: Tensor, condition: Condition) -> Tensor:
        values = logits(x0, condition)
        target = torch.zeros_like(values)
        target[:, list(classes)] = 1
        signal = diffusion.signal[level].reshape(-1, 1).to(values.dtype)
        return -(signal * (target - values)).norm().reshape(1)

    step = likelihood_step(strength)
    return _guided(diffusion, denoiser, likelihood, condition, n, step, generator=generator)


@torch.no_grad()
def _guided(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    likelihood: Likelihood,
    condition: Condition,
    n: int,
    step: GuidanceStep,
    maximum: Maximum | None = None,
    *,
    generator: Generator,
) -> Draws:
    """x[k-1] = a draw of the prior's kernel + the guidance step, for k = K..1."""
    counted, each = CountedDenoiser(denoiser), conditions.repeat(condition, n)
    x = diffusion.start(n * (conditions.count(condition) or 1), generator=generator)
    largest = 0.0 if maximum is None else maximum(each)
    for k in range(diffusion.levels, 0, -1):
        level = torch.full((len(x),), k, dtype=torch.int64, device=x.device)
        guidance = look_ahead(counted, likelihood, x, level, each)
        kernel = diffusion.kernel(guidance.prediction, x, level)
        x = kernel.sample(generator=generator) + step(replace(guidance, maximum=largest), kernel)
    return Draws(as_rows(x, condition, n), counted.calls / len(x))
