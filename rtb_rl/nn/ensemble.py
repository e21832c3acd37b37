"""Independent networks of one shape, evaluated together in batched matrix products."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from rtb_rl.errors import InputError


class EnsembleMLP(nn.Module):
    """`members` multilayer perceptrons with ReLU: [batch, input] -> [members, batch, output].

    Weights are stored as [members, input, output], so that one `baddbmm` per layer serves all
    members. Each member starts with the law of a stack of `torch.nn.Linear`: weights and biases
    uniform in +-1/sqrt(fan-in). With `layer_norm` every hidden layer is normalised, with a gain and
    a shift per member, before its ReLU (arXiv 2302.02948). Parameters are made on the device of
    `generator`.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        members: int,
        width: int = 256,
        depth: int = 2,
        layer_norm: bool = False,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if min(input_size, output_size, members, width) < 1 or depth < 0:
            raise InputError(
                f"EnsembleMLP got input_size={input_size}, output_size={output_size}, "
                f"members={members}, width={width}, depth={depth}; "
                "give depth at least 0 and the others at least 1"
            )
        sizes = [input_size, *[width] * depth, output_size]
        layers = list(pairwise(sizes))
        self.weights = nn.ParameterList(
            _uniform((members, fan_in, fan_out), fan_in, generator) for fan_in, fan_out in layers
        )
        self.biases = nn.ParameterList(
            _uniform((members, 1, fan_out), fan_in, generator) for fan_in, fan_out in layers
        )
        normalised = sizes[1:-1] if layer_norm else []
        self.gains = nn.ParameterList(
            torch.ones(members, 1, size, device=generator.device) for size in normalised
        )
        self.shifts = nn.ParameterList(
            torch.zeros(members, 1, size, device=generator.device) for size in normalised
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, input] -> [members, batch, output]."""
        hidden = x.expand(self.weights[0].shape[0], *x.shape)
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = _affine(hidden, weight, bias)
            if layer < last:
                hidden = self._normalise(layer, hidden).relu_()
        return hidden

    @torch.no_grad()
    def input_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [members, batch] and their gradients by x [members, batch, input], without
        autograd.

        For one output, else InputError. Without layer norm a third of the time that autograd takes.
        """
        if self.weights[-1].shape[2] != 1:
            raise InputError("input_gradient is for networks with one output")
        *layers, (weight, bias) = zip(self.weights, self.biases, strict=True)
        hidden, outputs = x.expand(self.weights[0].shape[0], *x.shape), []
        for layer, (inner, shift) in enumerate(layers):
            sums = torch.baddbmm(shift, hidden, inner)
            hidden = self._normalise(layer, sums).relu_()
            outputs.append((sums, hidden))
        values = ((hidden * weight.transpose(1, 2)).sum(2, keepdim=True) + bias).squeeze(2)
        slope = weight.transpose(1, 2).expand(-1, len(x), -1)
        for layer in range(len(layers) - 1, -1, -1):
            sums, output = outputs[layer]
            slope = self._normalise_gradient(layer, slope * (output > 0), sums)
            slope = torch.bmm(slope, layers[layer][0].transpose(1, 2))
        return values, slope

    def _normalise(self, layer: int, hidden: Tensor) -> Tensor:
        if not len(self.gains):
            return hidden
        normalised = nn.functional.layer_norm(hidden, hidden.shape[-1:])
        return torch.addcmul(self.shifts[layer], normalised, self.gains[layer])

    def _normalise_gradient(self, layer: int, slope: Tensor, hidden: Tensor) -> Tensor:
        """A gradient by what `_normalise` returns -> that by `hidden`, which it was given."""
        if not len(self.gains):
            return slope
        variance, mean = torch.var_mean(hidden, dim=-1, correction=0, keepdim=True)
        inverse = (variance + 1e-5).rsqrt()  # layer_norm's own eps
        normalised, slope = (hidden - mean) * inverse, slope * self.gains[layer]
        along = (slope * normalised).mean(-1, keepdim=True)
        return (slope - slope.mean(-1, keepdim=True) - normalised * along) * inverse


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight + bias for every member.

    A batched product with a single column takes a slow path on CPUs, five times the sum below.
    """
    if weight.shape[-1] == 1:
        return (x * weight.mT).sum(-1, keepdim=True) + bias
    return torch.baddbmm(bias, x, weight)


def _uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> nn.Parameter:
    """Uniform in +-1/sqrt(fan_in): what `torch.nn.Linear` draws for its weight and its bias."""
    bound = 1.0 / math.sqrt(fan_in)
    values = torch.empty(shape, device=generator.device)
    return nn.Parameter(values.uniform_(-bound, bound, generator=generator))
