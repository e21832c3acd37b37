"""Estimates of log Z: one number, a network of the condition, or the mean over a group of paths."""

import torch
from torch import Tensor, nn

from rtb_rl.core.protocols import Condition


class ScalarLogZ(nn.Module):
    """One learned number, for a task with a single condition."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def start_at(self, log_weight: Tensor) -> None:
        with torch.no_grad():
            self.value.copy_(log_weight.mean())

    def forward(self, condition: Condition, log_weight: Tensor) -> Tensor:
        return self.value.expand(log_weight.shape[0])


class ConditionalLogZ(nn.Module):
    """offset + scale * network(condition), a network of your own with one output a row: [batch] or
    [batch, 1].

    The offset is a learned number that starts at the first batch's mean log-weight, and `scale` is
    that batch's standard deviation (at least 1), so that a network of order one fits log Z in nats
    of any size.
    """

    scale: Tensor

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.offset = nn.Parameter(torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def start_at(self, log_weight: Tensor) -> None:
        with torch.no_grad():
            self.offset.copy_(log_weight.mean())
            self.scale.copy_(log_weight.std(correction=0).clamp(min=1))

    def forward(self, condition: Condition, log_weight: Tensor) -> Tensor:
        output = self.network(condition).reshape(-1)
        if output.shape != log_weight.shape:
            raise ValueError(
                f"the log Z network returned {output.numel()} values for {log_weight.numel()} "
                f"paths;"
                " it must return one a row of the condition"
            )
        return self.offset + self.scale * output


class GroupMeanLogZ(nn.Module):
    """The mean log-weight of the paths that share a condition (VarGrad; arXiv 2405.20971 section
    2.2).

    Rows come in groups of `size` neighbours. A group shares its condition **and not its endpoint**:
    with one endpoint the reward cancels from the loss. Nothing is learned. Raises ValueError for
    groups of one.
    """

    def __init__(self, size: int):
        super().__init__()
        if size < 2:
            raise ValueError(
                f"a group of {size} path(s) has residual zero whatever the posterior; use 2 or more"
            )
        self.size = size

    def start_at(self, log_weight: Tensor) -> None:
        pass

    def forward(self, condition: Condition, log_weight: Tensor) -> Tensor:
        if len(log_weight) % self.size:
            raise ValueError(f"{len(log_weight)} paths can't be cut into groups of {self.size}")
        mean = log_weight.reshape(-1, self.size).mean(1)
        return mean.repeat_interleave(self.size)

    def of_others(self, log_weight: Tensor) -> Tensor:
        """The mean over the other paths of each path's group: [batch], blind to the path itself."""
        return (self.size * self(None, log_weight) - log_weight) / (self.size - 1)
