"""A posterior denoiser written as the prior plus what is learned; it starts as the prior."""

import torch
from torch import Tensor, nn

from rtb_rl.core import GaussianDiffusion, ScaledPrediction
from rtb_rl.core.protocols import Condition


class Correction(nn.Module):
    """prior(x) + noise[level] * network(x): another predicted x_0, with the prior's spread kept.

    The network (x, level, condition) -> [batch, size] starts at zero and predicts a velocity
    (arXiv 2202.00512, appendix D), so that its output is of one order at every level. The prior is
    evaluated without gradient.
    """

    noise: Tensor

    def __init__(self, prior: nn.Module, network: nn.Module, diffusion: GaussianDiffusion):
        super().__init__()
        self.prior, self.network = prior, network
        self.register_buffer("noise", diffusion.noise.flatten(1).float(), persistent=False)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> ScaledPrediction:
        with torch.no_grad():
            x0, log_scale = with_scale(self.prior(x, level, condition))
        shift = self.noise[level].to(x.dtype) * self.network(x, level, condition)
        return ScaledPrediction(x0 + shift, log_scale)


class ScaledCorrection(nn.Module):
    """`Correction`, and a learned factor on the spread of each step and coordinate.

    The network returns [batch, 2 size]: the correction, then the logarithm of the factor, bounded
    by +-`limit` and zero at first. The factor depends on the point: the variance of the exact
    tilted step does, s^2 / (1 + P s^2) where the value function has curvature -P there.
    """

    noise: Tensor

    def __init__(
        self,
        prior: nn.Module,
        network: nn.Module,
        diffusion: GaussianDiffusion,
        *,
        limit: float = 1.5,
    ):
        super().__init__()
        self.prior, self.network, self.limit = prior, network, limit
        self.register_buffer("noise", diffusion.noise.flatten(1).float(), persistent=False)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> ScaledPrediction:
        with torch.no_grad():
            prediction = with_scale(self.prior(x, level, condition))
        output = self.network(x, level, condition)
        return scaled_correction(prediction, output, self.noise[level].to(x.dtype), self.limit)


def scaled_correction(
    prior: ScaledPrediction, output: Tensor, unit: Tensor, limit: float
) -> ScaledPrediction:
    """The prior's prediction with the correction, in `unit`, and the log-scale in `output`,
    [batch, 2 size].
    """
    shift, raw = output.chunk(2, dim=-1)
    log_scale = prior.log_scale + limit * torch.tanh(raw / limit)
    return ScaledPrediction(prior.x0 + unit * shift, log_scale)


def with_scale(prediction: Tensor | ScaledPrediction) -> ScaledPrediction:
    """The prediction with a log-scale, zero if it has none."""
    if isinstance(prediction, ScaledPrediction):
        return prediction
    return ScaledPrediction(prediction, torch.zeros_like(prediction))
