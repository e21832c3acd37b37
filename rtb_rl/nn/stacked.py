"""N networks of one shape held as one, with a leading axis over the networks.

A stacked module has the parameters of its networks under their own names, each with one axis more:
entry n of any tensor of its state is that of network n. Rows come in N equal blocks, block n for
network n: a batch [N * batch, ...] is read as [N, batch, ...] and every product is one `baddbmm`.
What a network computes from its block, and the gradient of its parameters, are what it computes
alone, to rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtb_rl.errors import InputError
from rtb_rl.nn.ensemble import EnsembleMLP
from rtb_rl.nn.mlp import MLP, ResidualMLP


def check_alike(modules: Sequence[nn.Module]) -> None:
    """InputError unless there is a module and all have tensors of the same names and shapes."""
    if not modules:
        raise InputError("there is no network to stack; give at least one")
    shapes = [{name: list(t.shape) for name, t in m.state_dict().items()} for m in modules]
    for other, found in enumerate(shapes[1:], 1):
        for name in sorted(shapes[0].keys() | found.keys()):
            first, second = shapes[0].get(name), found.get(name)
            if first != second:
                raise InputError(
                    f"networks 0 and {other} can't be stacked: {name} is {first} in the one and"
                    f" {second} in the other; give networks of one kind and size"
                )


def blocks(rows: Tensor, count: int) -> Tensor:
    """[count * batch, ...] as [count, batch, ...]; ValueError where the rows don't divide."""
    if len(rows) % count:
        raise ValueError(f"{len(rows)} rows can't be cut into {count} equal blocks")
    return rows.unflatten(0, (count, -1))


class StackedLinear(nn.Module):
    """[N, batch, inputs] -> [N, batch, outputs], a linear layer for each block."""

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        self.weight = stack([layer.weight for layer in layers])
        self.bias = stack([layer.bias for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.mT)


class StackedNorm(nn.Module):
    """[N, batch, width] -> the same, a layer norm with its own gain and shift for each block."""

    def __init__(self, norms: Sequence[nn.LayerNorm]):
        super().__init__()
        self.eps = norms[0].eps
        self.weight = stack([norm.weight for norm in norms])
        self.bias = stack([norm.bias for norm in norms])

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return _NormOfEach.apply(x, self.weight, self.bias, self.eps)  # type: ignore
        normalised = functional.layer_norm(x, x.shape[-1:], eps=self.eps)
        return torch.addcmul(self.bias.unsqueeze(1), normalised, self.weight.unsqueeze(1))


class _NormOfEach(torch.autograd.Function):
    """A fused layer norm for one block after another, while the block is in the cache.

    Written as one norm and a product, forward and backward take twice as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        shape = x.shape[-1:]
        each = [
            torch.native_layer_norm(row, shape, gain, shift, eps)
            for row, gain, shift in zip(x, weight, bias, strict=True)
        ]
        outputs, means, scales = zip(*each, strict=True)
        ctx.save_for_backward(x, weight, bias, *means, *scales)
        return torch.stack(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight, bias, *statistics = ctx.saved_tensors
        means, scales = statistics[: len(x)], statistics[len(x) :]
        each = [
            torch.ops.aten.native_layer_norm_backward(
                *(gradient[n].contiguous(), x[n], x.shape[-1:], means[n], scales[n]),
                *(weight[n], bias[n], [True, True, True]),
            )
            for n in range(len(x))
        ]
        return *(torch.stack(values) for values in zip(*each, strict=True)), None


class StackedTable(nn.Module):
    """A row of its own table for each row: int64 [N * batch] -> [N, batch, width]."""

    def __init__(self, tables: Sequence[nn.Embedding]):
        super().__init__()
        self.weight = stack([table.weight for table in tables])

    def forward(self, level: Tensor) -> Tensor:
        count, size = self.weight.shape[:2]
        first = torch.arange(0, count * size, size, device=level.device)
        index = blocks(level, count) + first[:, None]
        return functional.embedding(index, self.weight.flatten(0, 1))


class StackedResidualMLP(nn.Module):
    """`ResidualMLP` for N blocks of rows: x [N * batch, size] -> [N * batch, output size]."""

    condition_mean: Tensor
    condition_std: Tensor

    def __init__(self, networks: Sequence[ResidualMLP]):
        super().__init__()
        check_alike(networks)
        self.count = len(networks)
        _stack_buffers(self, networks, "condition_mean", "condition_std")
        self.first = StackedLinear([network.first for network in networks])
        self.level = StackedTable([network.level for network in networks])
        self.norms = _stack_each(StackedNorm, [network.norms for network in networks])
        self.blocks = _stack_each(StackedLinear, [network.blocks for network in networks])
        self.last = StackedLinear([network.last for network in networks])

    def forward(self, x: Tensor, level: Tensor, condition: Tensor | None) -> Tensor:
        x = blocks(x, self.count)
        if condition is not None:
            given = blocks(condition, self.count)
            given = (given - self.condition_mean.unsqueeze(1)) / self.condition_std.unsqueeze(1)
            x = torch.cat([x, given], dim=-1)
        hidden = self.first(x) + self.level(level)
        for norm, block in zip(self.norms, self.blocks, strict=False):
            hidden = hidden + block(functional.silu(norm(hidden)))
        return self.last(functional.silu(self.norms[-1](hidden))).flatten(0, 1)


class StackedMLP(nn.Module):
    """`MLP` for N blocks of rows: [N * batch, input size] -> [N * batch, output size]."""

    input_mean: Tensor
    input_std: Tensor

    def __init__(self, networks: Sequence[MLP]):
        super().__init__()
        check_alike(networks)
        self.count = len(networks)
        _stack_buffers(self, networks, "input_mean", "input_std")
        kinds = {nn.Linear: StackedLinear, nn.LayerNorm: StackedNorm}
        self.hidden = nn.Sequential(
            *(
                kinds[type(layers[0])](layers) if type(layers[0]) in kinds else nn.SiLU()
                for layers in zip(*(network.hidden for network in networks), strict=True)
            )
        )
        self.last = StackedLinear([network.last for network in networks])

    def forward(self, x: Tensor) -> Tensor:
        x = blocks(x, self.count)
        x = (x - self.input_mean.unsqueeze(1)) / self.input_std.unsqueeze(1)
        return self.last(self.hidden(x)).flatten(0, 1)


class StackedEnsemble(nn.Module):
    """`EnsembleMLP` for N blocks of rows: [N * batch, input] -> [members, N * batch, output]."""

    weights: nn.ParameterList
    biases: nn.ParameterList
    gains: nn.ParameterList
    shifts: nn.ParameterList

    def __init__(self, networks: Sequence[EnsembleMLP]):
        super().__init__()
        check_alike(networks)
        self.count, self.members = len(networks), len(networks[0].weights[0])
        for name in ("weights", "biases", "gains", "shifts"):
            lists = [getattr(network, name) for network in networks]
            setattr(self, name, nn.ParameterList(map(stack, zip(*lists, strict=True))))

    def forward(self, x: Tensor) -> Tensor:
        each = blocks(x, self.count).unsqueeze(1).expand(-1, self.members, -1, -1)
        hidden, last = each.flatten(0, 1), len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = _affine(hidden, weight.flatten(0, 1), bias.flatten(0, 1))
            if layer < last:
                hidden = self._normalise(layer, hidden).relu_()
        return hidden.unflatten(0, (self.count, self.members)).transpose(0, 1).flatten(1, 2)

    def _normalise(self, layer: int, hidden: Tensor) -> Tensor:
        if not len(self.gains):
            return hidden
        normalised = functional.layer_norm(hidden, hidden.shape[-1:])
        shift, gain = self.shifts[layer].flatten(0, 1), self.gains[layer].flatten(0, 1)
        return torch.addcmul(shift, normalised, gain)


def stack(tensors: Sequence[Tensor]) -> nn.Parameter:
    """The tensors as one trained parameter, along a new first axis."""
    return nn.Parameter(torch.stack([tensor.detach() for tensor in tensors]))


def _stack_each(kind: Callable[[Sequence], nn.Module], lists: Sequence) -> nn.ModuleList:
    """The first entries of the lists as one module, the second ones as one, and so on."""
    return nn.ModuleList(kind(layers) for layers in zip(*lists, strict=True))


def _stack_buffers(module: nn.Module, networks: Sequence[nn.Module], *names: str) -> None:
    for name in names:
        values = torch.stack([getattr(network, name) for network in networks])
        module.register_buffer(name, values)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight + bias for every network; a single column by a sum, as in EnsembleMLP."""
    if weight.shape[-1] == 1:
        return (x * weight.mT).sum(-1, keepdim=True) + bias
    return torch.baddbmm(bias, x, weight)
