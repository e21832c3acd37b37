"""Gaussian diffusion on real vectors of any shape."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core.kernels import GaussianKernel
from rtb_rl.core.protocols import Condition, Denoiser
from rtb_rl.core.schedules import Schedule

SIGNAL_WARNING = 0.05


class ScaledPrediction(NamedTuple):
    """Predicted clean data, and the logarithm of a factor on the spread of the step.

    Both [batch, *event]. What a denoiser returns that learns its spread: the exact posterior of a
    Gaussian chain under a concave reward is narrower at every step than its prior.
    """

    x0: Tensor
    log_scale: Tensor


class GaussianDiffusion(nn.Module):
    """x_k = signal[k] x_0 + noise[k] eps, denoised by N(mean_k(x_0 prediction, x_k), std_k^2).

    The mean is that of q(x_{k-1} | x_k, x_0) at the predicted x_0 (DDPM, arXiv 2006.11239 eq. 7).
    `std` is the spread of each step, [K] or [K, *event], row k - 1 for the step from level k; all
    positive. It has buffers and no parameters; `dtype` is that of the points it draws.

    Warns where `signal_left`, the signal at level K, is above 0.05: a posterior that keeps the
    prior's start law is then not exact, since x_0 depends on x_K under the prior.
    """

    signal: Tensor
    noise: Tensor
    ratio: Tensor
    step_noise: Tensor
    weight_x0: Tensor
    weight_x: Tensor
    std: Tensor

    def __init__(
        self,
        schedule: Schedule,
        event_shape: Sequence[int],
        std: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.levels = schedule.levels
        self.dtype = dtype
        self.signal_left = float(schedule.signal[-1])
        signal, noise, beta = schedule.signal, schedule.noise, schedule.step_variance
        ratio = torch.cat([torch.ones(1, dtype=signal.dtype), signal[1:] / signal[:-1]])
        shape = (-1,) + (1,) * len(self.event_shape)
        before = slice(0, self.levels)
        weight_x0 = signal[before] * beta[1:] / noise[1:].square()
        weight_x = ratio[1:] * noise[before].square() / noise[1:].square()
        self.register_buffer("signal", signal.reshape(shape))
        self.register_buffer("noise", noise.reshape(shape))
        self.register_buffer("ratio", ratio.reshape(shape))
        self.register_buffer("step_noise", beta.sqrt().reshape(shape))
        self.register_buffer("weight_x0", _from_level_one(weight_x0).reshape(shape))
        self.register_buffer("weight_x", _from_level_one(weight_x).reshape(shape))
        self.register_buffer("std", _from_level_one(self._checked(std)))
        if self.signal_left > SIGNAL_WARNING:
            warnings.warn(
                f"the schedule leaves signal {self.signal_left:.3f} at level {self.levels}, above"
                f" {SIGNAL_WARNING}: a posterior that shares the prior's start law can't be exact;"
                " use vp_schedule, cosine_schedule or zero_terminal_signal",
                stacklevel=2,
            )

    def _checked(self, std: Tensor) -> Tensor:
        shapes = (self.levels,), (self.levels, *self.event_shape)
        if tuple(std.shape) not in shapes:
            raise ValueError(
                f"std must have shape {shapes[0]} or {shapes[1]}, not {tuple(std.shape)}"
            )
        if not bool((std > 0).all()) or not bool(std.isfinite().all()):
            raise ValueError(
                "every step needs a positive finite spread, or it has no density;"
                f" smallest given: {float(std.min()):.3g}. small_spread(schedule, floor=...) sets "
                f"a floor"
            )
        std = std.detach().to(torch.float64)
        return std.reshape(self.levels, *(1,) * len(self.event_shape)) if std.ndim == 1 else std

    def start(self, batch: int, *, generator: Generator) -> Tensor:
        """x[K] ~ N(0, I): [batch, *event]."""
        return torch.randn(
            (batch, *self.event_shape),
            generator=generator,
            device=self.signal.device,
            dtype=self.dtype,
        )

    def kernel(
        self, prediction: Tensor | ScaledPrediction, x: Tensor, level: Tensor
    ) -> GaussianKernel:
        """The law of x[level - 1] given x and the predicted x_0; `level` [batch] in 1..K.

        ValueError for a prediction of another shape than x.
        """
        x0 = prediction.x0 if isinstance(prediction, ScaledPrediction) else prediction
        _check_shape(x0, x)
        dtype = torch.promote_types(x0.dtype, torch.float32)
        mean = self.weight_x0[level].to(dtype) * x0 + self.weight_x[level].to(dtype) * x
        std = self.std[level].to(dtype)
        if isinstance(prediction, ScaledPrediction):
            std = std * prediction.log_scale.exp()
        return GaussianKernel(mean, std)

    def corrupt(self, x0: Tensor, level: Tensor, *, generator: Generator) -> Tensor:
        """x[level] given x[0], in one draw; one level a row, 0..K."""
        eps = _normal_like(x0, generator)
        return self.signal[level].to(x0.dtype) * x0 + self.noise[level].to(x0.dtype) * eps

    def noise_path(self, x0: Tensor, *, generator: Generator) -> Tensor:
        """x[0..K] given x[0], step by step: [K + 1, batch, *event]."""
        ratio, step_noise = self.ratio.to(x0.dtype), self.step_noise.to(x0.dtype)
        path = [x0]
        for level in range(1, self.levels + 1):
            path.append(ratio[level] * path[-1] + step_noise[level] * _normal_like(x0, generator))
        return torch.stack(path)

    def denoising_loss(self, prediction: Tensor, x0: Tensor, x: Tensor, level: Tensor) -> Tensor:
        """|prediction - x0|^2 / noise[level]^2, mean over coordinates: [batch].

        The squared error of a velocity prediction (arXiv 2202.00512, appendix D). ValueError for a
        prediction of another shape than x_0.
        """
        _check_shape(prediction, x0)
        error = (prediction - x0) / self.noise[level].to(x0.dtype)
        return error.square().flatten(1).mean(1)

    def with_spread(self, std: Tensor) -> "GaussianDiffusion":
        """The same diffusion with another spread of its steps."""
        schedule = Schedule(self.signal.flatten().cpu())
        other = GaussianDiffusion(schedule, self.event_shape, std.cpu(), dtype=self.dtype)
        return other.to(self.signal.device)


def _check_shape(prediction: Tensor, x: Tensor) -> None:
    if prediction.shape != x.shape:
        raise ValueError(
            f"the denoiser returned {tuple(prediction.shape)} for x of shape {tuple(x.shape)}; it"
            " must predict x_0, a tensor of the same shape"
        )


def small_spread(schedule: Schedule, *, floor: float) -> Tensor:
    """[K] std of q(x_{k-1} | x_k, x_0), right for point-like data; zero at level 1, hence the
    floor.
    """
    variance = (
        schedule.step_variance[1:] * schedule.noise[:-1].square() / schedule.noise[1:].square()
    )
    return variance.sqrt().clamp(min=floor)


def large_spread(schedule: Schedule) -> Tensor:
    """[K] sqrt(beta_k), right for data N(0, I) (arXiv 2006.11239 section 3.2)."""
    return schedule.step_variance[1:].sqrt()


@torch.no_grad()
def calibrated_spread(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x0: Tensor,
    condition: Condition,
    *,
    generator: Generator,
    floor: float = 1e-3,
) -> Tensor:
    """[K, *event] std that the data itself has around the denoiser's steps.

        std_k^2 = small_spread_k^2 + weight_x0_k^2 E|x_0 - D(x_k)|^2

    The best spread that does not depend on x (arXiv 2201.06503, theorem 1, with the error measured
    instead of derived):
    with an exact denoiser and Gaussian data even a chain of few levels has the right marginals.
    `x0`: [batch, *event].
    """
    schedule = Schedule(diffusion.signal.flatten().cpu())
    rows = []
    for level in range(1, diffusion.levels + 1):
        levels = torch.full((len(x0),), level, dtype=torch.int64, device=x0.device)
        x = diffusion.corrupt(x0, levels, generator=generator)
        error = (denoiser(x, levels, condition) - x0).to(torch.float64).square().mean(0)
        rows.append(diffusion.weight_x0[level].square() * error)
    small = small_spread(schedule, floor=floor).to(x0.device)
    return (
        torch.stack(rows) + small.square().reshape(-1, *(1,) * len(diffusion.event_shape))
    ).sqrt()


def _from_level_one(table: Tensor) -> Tensor:
    """A table of rows for levels 1..K with an unused row in front, so that it is indexed by
    level.
    """
    return torch.cat([torch.ones_like(table[:1]), table])


def _normal_like(x: Tensor, generator: Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
