"""A convolutional network that values noisy images."""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from rtb_rl.nn.convolution import LAST_SIDE
from rtb_rl.nn.initial import initialise

EMBEDDING = 64


class ConvValue(nn.Module):
    """(images [batch, channels, height, width], level [batch], labels or None) -> [batch].

    Residual blocks of 3x3 convolutions that halve the image until it is 4x4 or smaller, each told
    the level; then two linear layers, of which the last has an output for each of `classes`.
    Several labels an image, [batch * times], neighbours of one image: [batch * times].
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        levels: int,
        *,
        classes: int | None = None,
        width: int = 32,
        generator: Generator,
    ):
        super().__init__()
        channels, height, rows = shape
        self.level = _embedding(levels + 1, generator)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        blocks, channels, stride = [], width, 1
        while stride == 1 or max(height, rows) > LAST_SIDE:
            wider = min(channels * stride, 4 * width)
            blocks.append(_Block(channels, wider, stride))
            height, rows = (height - 1) // stride + 1, (rows - 1) // stride + 1
            channels, stride = wider, 2
        self.blocks = nn.ModuleList(blocks)
        self.hidden = nn.Linear(channels * height * rows, 4 * width)
        self.last = nn.Linear(4 * width, classes or 1)
        for layer in (self.first, self.blocks, self.hidden, self.last):
            initialise(layer, generator=generator)

    def forward(self, images: Tensor, level: Tensor, labels: Tensor | None) -> Tensor:
        told = self.level(level)
        x = self.first(images)
        for block in self.blocks:
            x = block(x, told)
        hidden = functional.silu(self.hidden(functional.silu(x).flatten(1)))
        found = self.last(hidden)
        if labels is None:
            return found.squeeze(1)
        times = len(labels) // len(images)
        return found.repeat_interleave(times, 0).gather(1, labels.unsqueeze(1)).squeeze(1)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.before = nn.GroupNorm(_groups(inputs), inputs)
        self.down = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.told = nn.Linear(EMBEDDING, 2 * outputs)
        self.between = nn.GroupNorm(_groups(outputs), outputs)
        self.same = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.past = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.told(told)[..., None, None].chunk(2, 1)
        hidden = self.between(self.down(functional.silu(self.before(x))))
        return self.past(x) + self.same(functional.silu(hidden * (1 + scale) + shift))


def _groups(channels: int) -> int:
    return next(groups for groups in (8, 4, 2, 1) if channels % groups == 0)


def _embedding(rows: int, generator: Generator) -> nn.Embedding:
    table = nn.Embedding(rows, EMBEDDING, _weight=torch.empty(rows, EMBEDDING))
    table.weight.data.normal_(generator=generator)
    return table
