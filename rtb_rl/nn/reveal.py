"""A denoiser that learns which positions to reveal early."""

import torch
from torch import Tensor, nn

from rtb_rl.core import RevealPrediction
from rtb_rl.core.protocols import Condition


class LearnedReveal(nn.Module):
    """The network's log-probabilities, and a learned change of the log-odds of each reveal.

    One number for each level and position; it starts at zero, so the wrapper starts as the network,
    and stays within +-`limit`. For IndependentReveals, the law whose log-odds can change; it does
    nothing at level 1, where every masked position is revealed.
    """

    def __init__(self, network: nn.Module, *, levels: int, length: int, limit: float = 3.0):
        super().__init__()
        self.network, self.limit = network, limit
        self.shift = nn.Parameter(torch.zeros(levels + 1, length))

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> RevealPrediction:
        shift = self.limit * torch.tanh(self.shift / self.limit)
        return RevealPrediction(self.network(x, level, condition), shift[level])
