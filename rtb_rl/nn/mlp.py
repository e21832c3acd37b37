"""Small networks on vectors."""

from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional


class ResidualMLP(nn.Module):
    """Layer-normalised residual network (x, level, condition) -> [batch, output_size].

    `output_size` is `size` unless given. `x`: [batch, size]; `level`: int64 [batch], 1..levels;
    `condition`: [batch, condition_size] or None when that size is 0. Each level is one learned row
    added to the first hidden layer, so that embedding it costs a look-up. The condition is
    standardised by `condition_mean` and `condition_std`, buffers that start at 0 and 1. The last
    layer starts at zero.
    """

    condition_mean: Tensor
    condition_std: Tensor

    def __init__(
        self,
        size: int,
        levels: int,
        *,
        condition_size: int = 0,
        width: int = 256,
        blocks: int = 2,
        output_size: int | None = None,
        generator: Generator,
    ):
        super().__init__()
        self.register_buffer("condition_mean", torch.zeros(condition_size))
        self.register_buffer("condition_std", torch.ones(condition_size))
        self.first = linear(size + condition_size, width, generator=generator)
        table = torch.empty(levels + 1, width, device=generator.device)
        self.level = nn.Embedding(levels + 1, width, _weight=table)
        self.level.weight.data.normal_(std=0.1, generator=generator)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks + 1))
        self.blocks = nn.ModuleList(
            linear(width, width, generator=generator) for _ in range(blocks)
        )
        self.last = linear(width, output_size or size, generator=generator)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.to(generator.device)

    def standardise(self, conditions: Tensor) -> None:
        """Set the condition's mean and standard deviation from data: [rows, condition_size]."""
        self.condition_mean.copy_(conditions.mean(0))
        self.condition_std.copy_(conditions.std(0).clamp(min=1e-3))

    def forward(self, x: Tensor, level: Tensor, condition: Tensor | None) -> Tensor:
        if condition is not None:
            x = torch.cat([x, (condition - self.condition_mean) / self.condition_std], dim=-1)
        hidden = self.first(x) + self.level(level)
        for norm, block in zip(self.norms, self.blocks, strict=False):
            hidden = hidden + block(functional.silu(norm(hidden)))
        return self.last(functional.silu(self.norms[-1](hidden)))


class MLP(nn.Module):
    """A plain network of a vector: [batch, input_size] -> [batch, output_size], inputs
    standardised.

    The last layer starts at zero, so the output does.
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        width: int = 256,
        depth: int = 2,
        generator: Generator,
    ):
        super().__init__()
        self.register_buffer("input_mean", torch.zeros(input_size))
        self.register_buffer("input_std", torch.ones(input_size))
        sizes = [input_size] + [width] * depth
        hidden: list[nn.Module] = []
        for before, after in pairwise(sizes):
            hidden += [linear(before, after, generator=generator), nn.LayerNorm(after), nn.SiLU()]
        self.hidden = nn.Sequential(*hidden)
        self.last = linear(sizes[-1], output_size, generator=generator)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.to(generator.device)

    def standardise(self, inputs: Tensor) -> None:
        """Set the input's mean and standard deviation from data: [rows, input_size]."""
        self.input_mean.copy_(inputs.mean(0))
        self.input_std.copy_(inputs.std(0).clamp(min=1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden((x - self.input_mean) / self.input_std))


def linear(inputs: int, outputs: int, *, generator: Generator) -> nn.Linear:
    """torch.nn.Linear with its usual initial law, drawn from `generator`."""
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device=generator.device)
    bound = inputs**-0.5
    layer.weight.data.uniform_(-bound, bound, generator=generator)
    layer.bias.data.uniform_(-bound, bound, generator=generator)
    return layer
