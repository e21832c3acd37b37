"""Linear-Gaussian chains: with affine steps and a log-reward quadratic in x_0, all is exact.

Everything is per coordinate and in float64: tensors [*event], or [K, *event] where row k - 1
belongs to the step from level k. The value function log E[exp(reward) | x_k] stays quadratic, and
its recursion gives log Z, the exact posterior steps and where they end.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    Denoiser,
    GaussianDiffusion,
    ScaledPrediction,
    Schedule,
    log_snr_schedule,
    zero_terminal_signal,
)
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.tasks.toy.answer import Toy
from rtb_rl.tasks.toy.posterior import PosteriorMaker
from rtb_rl.training.task import Task


@dataclass(frozen=True)
class Chain:
    """x[k-1] = slope x[k] + shift + std eps, for k = K..1; each [K, *event]."""

    slope: Tensor
    shift: Tensor
    std: Tensor

    def final(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance at the end of the chain that starts from N(mean, variance)."""
        for k in range(len(self.slope) - 1, -1, -1):
            mean = self.slope[k] * mean + self.shift[k]
            variance = self.slope[k] ** 2 * variance + self.std[k] ** 2
        return mean, variance


@dataclass(frozen=True)
class Quadratic:
    """-curvature x^2 / 2 + slope x + offset, each [*event]; a log-reward or a value function."""

    curvature: Tensor
    slope: Tensor
    offset: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The sum over coordinates: [batch]."""
        return (-self.curvature * x**2 / 2 + self.slope * x + self.offset).flatten(1).sum(1)

    def log_mean_exp(self) -> Tensor:
        """log E exp under N(0, I), summed over coordinates."""
        precision = 1 + self.curvature
        return (self.offset + self.slope**2 / (2 * precision) - precision.log() / 2).sum()

    def tilted_start(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of N(0, I) times exp, normalised."""
        return self.slope / (1 + self.curvature), 1 / (1 + self.curvature)


def linear_reward(slope: Tensor) -> Quadratic:
    """slope . x."""
    return Quadratic(torch.zeros_like(slope), slope, torch.zeros_like(slope))


def squared_reward(curvature: Tensor, goal: Tensor) -> Quadratic:
    """-(curvature / 2) (x - goal)^2, summed over coordinates."""
    return Quadratic(curvature, curvature * goal, -curvature * goal**2 / 2)


def tilt(chain: Chain, reward: Quadratic) -> tuple[Chain, Quadratic]:
    """The chain tilted by exp(reward) of its end, and log E[exp(reward) | x_K] as a function.

    A linear reward leaves every spread as it is; a concave one narrows them.
    """
    value, steps = reward, []
    for slope, shift, std in zip(chain.slope, chain.shift, chain.std, strict=True):
        p, q, e, variance = value.curvature, value.slope, value.offset, std**2
        d = 1 + p * variance
        steps.append((slope / d, (shift + q * variance) / d, std / d.sqrt()))
        value = Quadratic(
            p * slope**2 / d,
            slope * (q - p * shift) / d,
            e - d.log() / 2 + (q**2 * variance + 2 * q * shift - p * shift**2) / (2 * d),
        )
    return Chain(*(torch.stack(column) for column in zip(*steps, strict=True))), value


@torch.no_grad()
def chain_of(diffusion: GaussianDiffusion, denoiser: Denoiser, *, last_level: int = 0) -> Chain:
    """The affine chain of a denoiser that is affine in x, read off its kernels at x = 0 and 1.

    It ends at `last_level`.
    """
    level = torch.arange(last_level + 1, diffusion.levels + 1)
    zero = torch.zeros((len(level), *diffusion.event_shape), dtype=torch.float64)
    at_zero = diffusion.kernel(denoiser(zero, level, None), zero, level)
    at_one = diffusion.kernel(denoiser(zero + 1, level, None), zero + 1, level)
    return Chain(at_one.mean - at_zero.mean, at_zero.mean, at_zero.std.expand_as(zero))


class GaussianDenoiser(nn.Module):
    """E[x_0 | x_k] for data N(mean, variance), each [*event]; in the dtype of x."""

    signal: Tensor
    gain: Tensor
    mean: Tensor

    def __init__(self, schedule: Schedule, mean: Tensor, variance: Tensor):
        super().__init__()
        signal = schedule.signal.reshape(-1, *(1,) * mean.ndim)
        gain = signal * variance / _noised_variance(schedule, variance)
        self.register_buffer("signal", signal, persistent=False)
        self.register_buffer("gain", gain, persistent=False)
        self.register_buffer("mean", mean, persistent=False)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        signal, gain, mean = (t.to(x.dtype) for t in (self.signal, self.gain, self.mean))
        return mean + gain[level] * (x - signal[level] * mean)


class AffineDenoiser(nn.Module):
    """slope[k] x + shift[k], both [K, *event]: the predicted x_0."""

    slope: Tensor
    shift: Tensor

    def __init__(self, slope: Tensor, shift: Tensor):
        super().__init__()
        self.register_buffer("slope", slope, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        slope, shift = self.slope.to(x.dtype), self.shift.to(x.dtype)
        return slope[level - 1] * x + shift[level - 1]


class NarrowedDenoiser(nn.Module):
    """A denoiser with a known factor on the spread of each step: log_scale [K, *event]."""

    log_scale: Tensor

    def __init__(self, denoiser: nn.Module, log_scale: Tensor):
        super().__init__()
        self.denoiser = denoiser
        self.register_buffer("log_scale", log_scale, persistent=False)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> ScaledPrediction:
        log_scale = self.log_scale.to(x.dtype)[level - 1]
        return ScaledPrediction(self.denoiser(x, level, condition), log_scale)


def denoiser_of(diffusion: GaussianDiffusion, chain: Chain) -> AffineDenoiser:
    """The denoiser whose kernels have the means of the chain, and the diffusion's own spread."""
    level = torch.arange(1, diffusion.levels + 1)
    zero = torch.zeros((len(level), *diffusion.event_shape), dtype=torch.float64)
    per_prediction = diffusion.kernel(zero + 1, zero, level).mean
    per_x = diffusion.kernel(zero, zero + 1, level).mean
    return AffineDenoiser((chain.slope - per_x) / per_prediction, chain.shift / per_prediction)


def exact_posterior(
    diffusion: GaussianDiffusion, prior: Denoiser, reward: Quadratic
) -> tuple[NarrowedDenoiser, Quadratic]:
    """The denoiser of the prior's chain tilted by exp(reward), and log E[exp(reward) | x_K].

    The prior is affine in x. Exact for the whole chain where that value does not depend on x_K: a
    schedule without signal at level K, or a start from one point.
    """
    chain = chain_of(diffusion, prior)
    tilted, value = tilt(chain, reward)
    log_scale = (tilted.std / chain.std).log()
    return NarrowedDenoiser(denoiser_of(diffusion, tilted), log_scale), value


def exact_spread(schedule: Schedule, variance: Tensor) -> Tensor:
    """[K, *event] std of x[k-1] given x[k] for Gaussian data of that variance: no step is off."""
    total = _noised_variance(schedule, variance)
    beta = schedule.step_variance[1:].reshape(-1, *(1,) * variance.ndim)
    return (total[:-1] * beta / total[1:]).sqrt()


def gaussian_chain(
    mean: Tensor, variance: Tensor, reward: Quadratic, *, levels: int, posterior: PosteriorMaker
) -> Toy:
    """Data N(mean, variance) with its exact denoiser, tilted by a linear or quadratic log-reward.

    `mean`, `variance` and the reward's tensors: float64 [size]. The chain has the law of the data
    at every number of levels and forgets x_K, so that `exact_posterior` has residual zero on any
    path; a linear reward needs no spread but the prior's. Errors: those of `moment_errors`.
    """
    if not bool((1 + reward.curvature * variance > 0).all()):
        raise InputError("exp(reward) grows faster than the data thins out; use curvature >= 0")
    schedule = zero_terminal_signal(log_snr_schedule(levels))
    diffusion = GaussianDiffusion(schedule, mean.shape, exact_spread(schedule, variance))
    prior = GaussianDenoiser(schedule, mean, variance)
    tilted, value = tilt(chain_of(diffusion, prior), reward)
    final_mean, final_variance = tilted.final(*value.tilted_start())

    task = Task(
        name="gaussian_chain",
        diffusion=diffusion,
        prior=prior,
        posterior=posterior(prior, diffusion, 0),
        log_reward=lambda x0, condition: reward(x0.double()).to(x0.dtype),
        draw_conditions=lambda n, *, generator: (
            None,
            gaussian_draws(mean, variance, n, generator=generator),
        ),
        draw_target=lambda condition, n, *, generator: gaussian_draws(
            final_mean, final_variance, n, generator=generator
        ),
    )
    return Toy(
        task,
        log_z=lambda condition: value.log_mean_exp().reshape(1),
        errors=lambda x0, condition: moment_errors(x0, mean, final_mean, final_variance),
        exact_posterior=exact_posterior(diffusion, prior, reward)[0],
    )


def gaussian_draws(mean: Tensor, variance: Tensor, n: int, *, generator: Generator) -> Tensor:
    """`n` draws of N(mean, variance) for every row: [*rows, n, size], float32."""
    noise = torch.randn(*mean.shape[:-1], n, mean.shape[-1], generator=generator)
    return mean.float()[..., None, :] + variance.sqrt().float() * noise


def moment_errors(
    x0: Tensor, prior_mean: Tensor, mean: Tensor, variance: Tensor
) -> dict[str, float]:
    """Relative errors of draws [*rows, n, size] against means [*rows, size] and a variance.

    "mean": distance from the exact mean over the distance by which the reward moved it; "variance":
    abs. error over the exact value, mean over coordinates and rows.
    """
    x0 = x0.double()
    missed, moved = (x0.mean(-2) - mean).norm(dim=-1), (mean - prior_mean).norm(dim=-1)
    ratio = x0.var(-2) / variance
    return {
        "mean": float(missed.mean() / moved.mean()),
        "variance": float((ratio - 1).abs().mean()),
    }


def _noised_variance(schedule: Schedule, variance: Tensor) -> Tensor:
    """Variance of x_k, [K + 1, *event], for data of the given variance."""
    squared = schedule.signal.square().reshape(-1, *(1,) * variance.ndim)
    return squared * variance + 1 - squared
