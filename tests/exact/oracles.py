"""Closed forms that tests compare with: linear-Gaussian chains and Gaussian mixtures, in float64.

Everything Gaussian is per coordinate: tensors shaped [*event], or [K, *event] where row k - 1
belongs to the step from level k.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rtb_rl.core import Denoiser, GaussianDiffusion, Schedule
from rtb_rl.core.protocols import Condition


@dataclass(frozen=True)
class Chain:
    """x[k-1] = slope x[k] + shift + std eps, for k = K..1."""

    slope: Tensor
    shift: Tensor
    std: Tensor

    def final(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance at the end of the chain that starts from N(mean, variance)."""
        for slope, shift, std in reversed(
            list(zip(self.slope, self.shift, self.std.expand_as(self.slope), strict=True))
        ):
            mean, variance = slope * mean + shift, slope**2 * variance + std**2
        return mean, variance


@dataclass(frozen=True)
class Quadratic:
    """-curvature x^2 / 2 + slope x + offset."""

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
    return Quadratic(torch.zeros_like(slope), slope, torch.zeros_like(slope))


def squared_reward(curvature: Tensor, goal: Tensor) -> Quadratic:
    """-(curvature / 2) (x - goal)^2."""
    return Quadratic(curvature, curvature * goal, -curvature * goal**2 / 2)


@torch.no_grad()
def chain_of(diffusion: GaussianDiffusion, denoiser: Denoiser, *, last_level: int = 0) -> Chain:
    """The affine chain of a denoiser that is affine in x, read off its kernels at x = 0 and 1."""
    level = torch.arange(last_level + 1, diffusion.levels + 1)
    zero = torch.zeros((len(level), *diffusion.event_shape), dtype=torch.float64)
    at_zero = diffusion.kernel(denoiser(zero, level, None), zero, level)
    at_one = diffusion.kernel(denoiser(zero + 1, level, None), zero + 1, level)
    return Chain(at_one.mean - at_zero.mean, at_zero.mean, at_zero.std)


def tilt(chain: Chain, reward: Quadratic) -> tuple[Chain, Quadratic]:
    """The chain tilted by exp(reward) of its end, and log E[exp(reward) | x] at its start."""
    value, steps = reward, []
    rows = zip(chain.slope, chain.shift, chain.std.expand_as(chain.slope), strict=True)
    for slope, shift, std in rows:
        p, q, e, variance = value.curvature, value.slope, value.offset, std**2
        d = 1 + p * variance
        steps.append((slope / d, (shift + q * variance) / d, std / d.sqrt()))
        value = Quadratic(
            p * slope**2 / d,
            slope * (q - p * shift) / d,
            e - d.log() / 2 + (q**2 * variance + 2 * q * shift - p * shift**2) / (2 * d),
        )
    return Chain(*(torch.stack(column) for column in zip(*steps, strict=True))), value


def gaussian_denoiser(schedule: Schedule, mean: Tensor, variance: Tensor) -> Denoiser:
    """E[x_0 | x_k] for data N(mean, variance)."""
    shape = (-1,) + (1,) * mean.ndim
    signal, noise = schedule.signal.reshape(shape), schedule.noise.reshape(shape)

    def denoise(x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        s = signal[level]
        total = s**2 * variance + noise[level] ** 2
        return (mean + s * variance / total * (x - s * mean)).to(x.dtype)

    return denoise


def denoiser_of(diffusion: GaussianDiffusion, chain: Chain) -> Denoiser:
    """The denoiser whose kernels have the means of the chain (and the diffusion's own spread)."""
    level = torch.arange(1, diffusion.levels + 1)
    zero = torch.zeros((len(level), *diffusion.event_shape), dtype=torch.float64)
    per_prediction = diffusion.kernel(zero + 1, zero, level).mean
    per_x = diffusion.kernel(zero, zero + 1, level).mean
    slope, shift = (chain.slope - per_x) / per_prediction, chain.shift / per_prediction
    return lambda x, level, condition: slope[level - 1] * x + shift[level - 1]


def exact_posterior(
    diffusion: GaussianDiffusion, prior: Denoiser, slope: Tensor
) -> tuple[Denoiser, Quadratic]:
    """The denoiser of the chain tilted by exp(slope . x_0), and log E[exp | x_K].

    The prior is affine in x; then the tilted steps have the prior's spread, hence are realisable.
    """
    tilted, value = tilt(chain_of(diffusion, prior), linear_reward(slope))
    return denoiser_of(diffusion, tilted), value


class FixedStart(GaussianDiffusion):
    """A chain that starts at one point."""

    point: float = 0.7

    def start(self, batch: int, *, generator: Generator) -> Tensor:
        return torch.full((batch, *self.event_shape), self.point, dtype=self.dtype)


@dataclass(frozen=True)
class Mixture:
    """sum_n weights_n N(means_n, variances_n I); [n], [n, size], [n]."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def tilted(self, slope: Tensor) -> tuple["Mixture", Tensor]:
        """The mixture times exp(slope . x), normalised, and the log of the normaliser."""
        log_weights = (
            self.weights.log() + self.means @ slope + self.variances * slope.square().sum() / 2
        )
        means = self.means + self.variances[:, None] * slope
        return Mixture(log_weights.softmax(0), means, self.variances), log_weights.logsumexp(0)

    def denoiser(self, schedule: Schedule) -> Denoiser:
        """E[x_0 | x_k]: the components' posterior means, weighted by their responsibilities."""

        def denoise(x: Tensor, level: Tensor, condition: Condition) -> Tensor:
            signal = schedule.signal.to(x.dtype)[level].reshape(-1, 1, 1)
            total = signal**2 * self.variances[:, None] + 1 - signal**2
            error = x[:, None] - signal * self.means
            log_density = -(error**2 / total + total.log()).sum(2) / 2
            share = (log_density + self.weights.log()).softmax(1)[..., None]
            gain = signal * self.variances[:, None] / total
            return (share * (self.means + gain * error)).sum(1)

        return denoise

    def nearest(self, x: Tensor) -> Tensor:
        """The share of points nearest to each mean: [n]."""
        index = torch.cdist(x, self.means.to(x.dtype)).argmin(1)
        return torch.bincount(index, minlength=len(self.weights)) / len(x)
