"""A denoiser that learns how wide its steps are."""

import torch
from torch import Tensor, nn

from rtb_rl.core import ScaledPrediction
from rtb_rl.core.protocols import Condition


class LearnedSpread(nn.Module):
    """The network's prediction, and a learned factor on the spread of each level and coordinate.

    The logarithm of the factor starts at zero, so the wrapper starts as the network, and stays
    within +-`limit`. With the prior's spread kept, the posterior of a chain of few levels is too
    wide: the exact tilted kernel of a Gaussian chain has variance s^2 / (1 + P s^2) where the value
    function has curvature -P (rtb's realisability floor; arXiv 2405.20971 shares the spreads).
    """

    def __init__(self, network: nn.Module, *, levels: int, size: int, limit: float = 1.5):
        super().__init__()
        self.network, self.limit = network, limit
        self.log_scale = nn.Parameter(torch.zeros(levels + 1, size))

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> ScaledPrediction:
        log_scale = self.limit * torch.tanh(self.log_scale / self.limit)
        return ScaledPrediction(self.network(x, level, condition), log_scale[level])
