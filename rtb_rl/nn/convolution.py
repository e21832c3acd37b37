"""A small convolutional classifier of images."""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from rtb_rl.nn.mlp import linear

LAST_SIDE = 4  # pixels a side of the last feature map, at most


class ConvClassifier(nn.Module):
    """Images [batch, channels, height, width] in [0, 1] -> logits [batch, classes].

    3x3 convolutions, halving the image until it is 4x4 or smaller, two linear layers, SiLU between
    them; each image alone decides its logits. `temperature`, a buffer that starts at 1, divides
    the logits: what calibration sets.
    """

    temperature: Tensor

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        width: int = 32,
        generator: Generator,
    ):
        super().__init__()
        self.shape, self.classes = tuple(shape), classes
        channels, height, rows = shape
        self.convolutions = nn.ModuleList(
            [_convolution(channels, width, stride=1, generator=generator)]
        )
        channels = width
        while max(height, rows) > LAST_SIDE:
            wider = min(2 * channels, 4 * width)
            self.convolutions.append(_convolution(channels, wider, stride=2, generator=generator))
            channels, height, rows = wider, (height + 1) // 2, (rows + 1) // 2
        self.hidden = linear(channels * height * rows, 4 * width, generator=generator)
        self.last = linear(4 * width, classes, generator=generator)
        self.register_buffer("temperature", torch.ones((), device=generator.device))

    def features(self, images: Tensor) -> Tensor:
        """The activations below the last layer: [batch, 4 * width]."""
        x = 2 * images - 1
        for convolution in self.convolutions:
            x = functional.silu(convolution(x))
        return functional.silu(self.hidden(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.features(images)) / self.temperature


def _convolution(inputs: int, outputs: int, *, stride: int, generator: Generator) -> nn.Conv2d:
    """A 3x3 convolution whose weights keep the variance of what passes, drawn from `generator`."""
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, device="meta")
    layer = layer.to_empty(device=generator.device)
    bound = math.sqrt(6 / (9 * inputs))
    layer.weight.data.uniform_(-bound, bound, generator=generator)
    layer.bias.data.zero_()  # type: ignore[union-attr]
    return layer
