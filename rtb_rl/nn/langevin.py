"""A denoiser that leans along the gradient of the log-reward."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rtb_rl.core.protocols import Condition


class LangevinDenoiser(nn.Module):
    """network(x) + scale[level] * grad log r at the network's prediction, clipped to norm `clip`.

    The inductive bias of arXiv 2405.20971, appendix G, on the clean-data prediction. `scale` has
    one learned number a level and coordinate and starts at zero, so the wrapper starts as the
    network. `gradient`: (x0 [batch, size], condition) -> d log r / d x0, shaped as x0.
    """

    def __init__(
        self,
        network: nn.Module,
        gradient: Callable[[Tensor, Condition], Tensor],
        *,
        levels: int,
        size: int,
        clip: float = 10.0,
    ):
        super().__init__()
        self.network, self.gradient, self.clip = network, gradient, clip
        self.scale = nn.Parameter(torch.zeros(levels + 1, size))

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        x0 = self.network(x, level, condition)
        slope = self.gradient(x0.detach(), condition)
        norm = slope.norm(dim=-1, keepdim=True)
        slope = slope * (self.clip / norm.clamp(min=self.clip))
        return torch.addcmul(x0, self.scale[level], slope)
