"""An exponential moving average of a network's parameters."""

import copy

import torch
from torch import nn


class Average(nn.Module):
    """average <- average + (1 - decay) (parameters - average), once an update.

    The decay starts low, min(decay, (1 + n) / (10 + n)) at update n, so that the first parameters
    are soon forgotten. `module` is the averaged network, without gradients; buffers are copied.
    """

    updates: torch.Tensor

    def __init__(self, source: nn.Module, decay: float):
        super().__init__()
        self.module = copy.deepcopy(source).requires_grad_(False).eval()
        self.decay = decay
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._averaged = list(self.module.parameters())

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        count = int(self.updates)
        weight = 1 - min(self.decay, (1 + count) / (10 + count))
        for average, parameter in zip(self._averaged, source.parameters(), strict=True):
            average.lerp_(parameter, weight)
        self.updates += 1
