"""Denoisers of one shape held as one: stacked networks inside the wrappers of a denoiser."""

import copy
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from rtb_rl.core import ScaledPrediction, VelocityPrediction
from rtb_rl.core.protocols import Condition
from rtb_rl.nn.langevin import LangevinDenoiser
from rtb_rl.nn.mlp import ResidualMLP
from rtb_rl.nn.spread import LearnedSpread
from rtb_rl.nn.stacked import StackedResidualMLP, blocks, check_alike, stack


def stack_denoisers(denoisers: Sequence[nn.Module]) -> nn.Module:
    """Denoisers over actions of one shape as one, layer by layer."""
    check_alike(denoisers)
    first = denoisers[0]
    if isinstance(first, ResidualMLP):
        return StackedResidualMLP(cast(list[ResidualMLP], denoisers))
    network = stack_denoisers([cast(nn.Module, denoiser.network) for denoiser in denoisers])
    if isinstance(first, LearnedSpread):
        return StackedSpread(cast(list[LearnedSpread], denoisers), network)
    if isinstance(first, LangevinDenoiser):
        return StackedLangevin(cast(list[LangevinDenoiser], denoisers), network)
    assert isinstance(first, VelocityPrediction)
    wrapper = copy.deepcopy(first)
    wrapper.network = network
    return wrapper


def look_up(table: Tensor, level: Tensor) -> Tensor:
    """table[n, level of row] for the rows of block n: [N, levels, ...] -> [rows, ...]."""
    count, size = table.shape[:2]
    first = torch.arange(0, count * size, size, device=level.device)
    return table.flatten(0, 1)[(blocks(level, count) + first[:, None]).flatten()]


class StackedSpread(nn.Module):
    """`LearnedSpread` for N blocks of rows, around a stacked network."""

    def __init__(self, wrappers: Sequence[LearnedSpread], network: nn.Module):
        super().__init__()
        self.network, self.limit = network, wrappers[0].limit
        self.log_scale = stack([wrapper.log_scale for wrapper in wrappers])

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> ScaledPrediction:
        log_scale = self.limit * torch.tanh(self.log_scale / self.limit)
        return ScaledPrediction(self.network(x, level, condition), look_up(log_scale, level))


class StackedLangevin(nn.Module):
    """`LangevinDenoiser` for N blocks of rows, around a stacked network; each has its gradient."""

    def __init__(self, wrappers: Sequence[LangevinDenoiser], network: nn.Module):
        super().__init__()
        self.network, self.clip = network, wrappers[0].clip
        self.gradients: list[Callable[[Tensor, Condition], Tensor]]
        self.gradients = [wrapper.gradient for wrapper in wrappers]
        self.scale = stack([wrapper.scale for wrapper in wrappers])

    def forward(self, x: Tensor, level: Tensor, condition: Tensor) -> Tensor:
        x0, count = self.network(x, level, condition), len(self.gradients)
        points = zip(
            self.gradients, blocks(x0.detach(), count), blocks(condition, count), strict=True
        )
        slope = torch.cat([gradient(x, given) for gradient, x, given in points])
        norm = slope.norm(dim=-1, keepdim=True)
        slope = slope * (self.clip / norm.clamp(min=self.clip))
        return torch.addcmul(x0, look_up(self.scale, level), slope)
