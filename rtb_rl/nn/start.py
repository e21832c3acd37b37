"""A learned law of x[K] for chains that keep signal at the last level."""

import torch
from torch import Tensor, nn

from rtb_rl.core import ScaledPrediction, StartStep
from rtb_rl.core.protocols import Condition


class LearnedStart(nn.Module):
    """A denoiser of the inner diffusion, with x[K] ~ N(mean, exp(log_scale)^2) on a `StartStep`.

    Mean and log-scale are learned, [*event], and start at zero: N(0, I). `network(condition)` ->
    [batch, 2, *event] adds what depends on the condition; start it at zero.
    """

    def __init__(
        self, denoiser: nn.Module, diffusion: StartStep, *, network: nn.Module | None = None
    ):
        super().__init__()
        self.denoiser, self.network, self.levels = denoiser, network, diffusion.inner.levels
        self.start = nn.Parameter(torch.zeros(2, *diffusion.event_shape))

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> ScaledPrediction:
        prediction = self.denoiser(x, level.clamp(max=self.levels), condition)
        if not isinstance(prediction, ScaledPrediction):
            prediction = ScaledPrediction(prediction, torch.zeros_like(prediction))
        start = self.start.to(x.dtype).expand(len(x), *self.start.shape)
        if self.network is not None:
            start = start + self.network(condition)
        first = (level > self.levels).reshape(-1, *(1,) * (x.ndim - 1))
        mean, log_scale = start.unbind(1)
        return ScaledPrediction(
            torch.where(first, mean, prediction.x0),
            torch.where(first, log_scale, prediction.log_scale),
        )
