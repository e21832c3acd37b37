"""The draw of x[K] as a denoising step of its own, so that a posterior can learn it."""

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core.gaussian import GaussianDiffusion, ScaledPrediction
from rtb_rl.core.kernels import GaussianKernel
from rtb_rl.core.protocols import Condition, Denoiser


class StartStep(nn.Module):
    """A Gaussian diffusion with one level more: x[K + 1] = 0, and x[K] is drawn from there.

    For chains that keep signal at level K. There x[0] depends on x[K], the exact posterior has a
    start law of its own, and one that shares the prior's can't be exact. Here all chains begin at
    one point, and a prediction at level K + 1 is the mean of x[K] itself, N(0, I) for a prediction
    of zero (`StandardStart`), anything for `rtb_rl.nn.LearnedStart`.
    """

    signal_left = 0.0

    def __init__(self, diffusion: GaussianDiffusion):
        super().__init__()
        self.inner = diffusion
        self.levels = diffusion.levels + 1
        self.event_shape = diffusion.event_shape

    def start(self, batch: int, *, generator: Generator) -> Tensor:
        """x[K + 1] = 0: [batch, *event]."""
        shape, device = (batch, *self.event_shape), self.inner.signal.device
        return torch.zeros(shape, dtype=self.inner.dtype, device=device)

    def kernel(
        self, prediction: Tensor | ScaledPrediction, x: Tensor, level: Tensor
    ) -> GaussianKernel:
        """The law of x[level - 1]; N(prediction, scale^2) at level K + 1."""
        kernel = self.inner.kernel(prediction, x, level.clamp(max=self.inner.levels))
        scaled = isinstance(prediction, ScaledPrediction)
        x0, log_scale = prediction if scaled else (prediction, torch.zeros_like(prediction))
        first = self._first(level, x)
        mean = torch.where(first, x0.to(kernel.mean.dtype), kernel.mean)
        return GaussianKernel(mean, torch.where(first, log_scale.exp().to(mean.dtype), kernel.std))

    def corrupt(self, x0: Tensor, level: Tensor, *, generator: Generator) -> Tensor:
        """x[level] given x[0]; zero at level K + 1."""
        x = self.inner.corrupt(x0, level.clamp(max=self.inner.levels), generator=generator)
        return torch.where(self._first(level, x), 0.0, x)

    def noise_path(self, x0: Tensor, *, generator: Generator) -> Tensor:
        """x[0..K + 1] given x[0]: [K + 2, batch, *event]."""
        path = self.inner.noise_path(x0, generator=generator)
        return torch.cat([path, torch.zeros_like(path[:1])])

    def denoising_loss(self, prediction: Tensor, x0: Tensor, x: Tensor, level: Tensor) -> Tensor:
        """That of the inner diffusion; level K + 1 counts as level K."""
        return self.inner.denoising_loss(prediction, x0, x, level.clamp(max=self.inner.levels))

    def _first(self, level: Tensor, x: Tensor) -> Tensor:
        return (level > self.inner.levels).reshape(-1, *(1,) * (x.ndim - 1))


class StandardStart(nn.Module):
    """A denoiser of the inner diffusion, with x[K] ~ N(0, I): the prior on a `StartStep`."""

    def __init__(self, denoiser: Denoiser, diffusion: StartStep):
        super().__init__()
        self.denoiser, self.levels = denoiser, diffusion.inner.levels

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor | ScaledPrediction:
        prediction = self.denoiser(x, level.clamp(max=self.levels), condition)
        first = (level > self.levels).reshape(-1, *(1,) * (x.ndim - 1))
        if isinstance(prediction, ScaledPrediction):
            return ScaledPrediction(*(torch.where(first, 0.0, part) for part in prediction))
        return torch.where(first, 0.0, prediction)
