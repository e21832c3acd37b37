"""How near the figure of a picture is to a circle, a square, a triangle, a cross or a diamond."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rtb_rl.tasks.text_to_image.colours import TINY, check_word, foreground, presence, wanted_words
from rtb_rl.tasks.text_to_image.rewards import Metadata


@dataclass(frozen=True)
class Outline:
    """A shape around its centre of mass, at size 1.

    `area`: of the shape. `distance(x, y)`: of a point to its edge, negative inside; y points down.
    """

    area: float
    distance: Callable[[Tensor, Tensor], Tensor]


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return (x.square() + y.square() + 1e-12).sqrt() - 1  # without 1e-12 no gradient at the centre


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 1


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    """Upright and as high as wide, 2: the tip is 4/3 above the centre of mass."""
    return torch.maximum(y - 2 / 3, (2 * x.abs() - y - 4 / 3) / math.sqrt(5))


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """A plus: arms a third as thick as the whole is long, 2."""
    across = torch.maximum(x.abs() - 1, y.abs() - 1 / 3)
    return torch.minimum(across, torch.maximum(x.abs() - 1 / 3, y.abs() - 1))


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() + y.abs() - 1) / math.sqrt(2)


OUTLINES: Mapping[str, Outline] = {
    "circle": Outline(math.pi, _circle),
    "square": Outline(4.0, _square),
    "triangle": Outline(2.0, _triangle),
    "cross": Outline(20 / 9, _cross),
    "diamond": Outline(2.0, _diamond),
}


def coverage(outline: Outline, centre: Tensor, area: Tensor, height: int, width: int) -> Tensor:
    """The share of each pixel that a shape covers: [n, height, width] in [0, 1].

    `centre`: x and y from the upper left corner, [n, 2], and `area`: [n], above 0, in pixels. An
    edge is taken as straight within a pixel: clamp(1/2 - distance, 0, 1).
    """
    size = (area / outline.area).sqrt()[:, None, None]
    x = (torch.arange(width).to(centre) + 0.5 - centre[:, :1])[:, None, :]
    y = (torch.arange(height).to(centre) + 0.5 - centre[:, 1:])[:, :, None]
    x, y = torch.broadcast_tensors(x, y)
    return (0.5 - size * outline.distance(x / size, y / size)).clamp(0, 1)


@dataclass(frozen=True)
class ShapeScore:
    """-`scale` times the squared distance of the figure to a shape, relative to both, nats.

        log r = -scale (a sum_i (w_i - t_i)^2 / sum_i (w_i^2 + t_i^2) + (1 - a))

    with w of `foreground`, a of `presence`, and t the coverage of the shape that has the area
    sum w and the centre of mass of the figure. The ratio is 0 for the shape itself and 1 where
    nothing overlaps; an image without a figure gets 1. Shapes stand upright; a turned one is
    another. `shape`: a word of `outlines`, or None for the first such word of each prompt.
    InputError for a shape that is not there.
    """

    shape: str | None = None
    scale: float = 1.0
    outlines: Mapping[str, Outline] = field(default_factory=lambda: OUTLINES)
    differentiable = True

    def __post_init__(self):
        if self.shape is not None:
            check_word(self.shape, self.outlines, "shape")

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        words = wanted_words(self.shape, self.outlines, prompts, len(images), "shape")
        weight = foreground(images)
        centre, area = _moments(weight)
        distances = weight.new_zeros(len(images))
        for word in dict.fromkeys(words):
            rows = torch.tensor([row for row, one in enumerate(words) if one == word])
            rows = rows.to(images.device)
            template = coverage(self.outlines[word], centre[rows], area[rows], *images.shape[-2:])
            found = _relative_distance(weight[rows], template)
            distances = distances.index_copy(0, rows, found)
        return -self.scale * torch.lerp(torch.ones_like(distances), distances, presence(weight))


def _moments(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(centre of mass [n, 2], area [n]) of the weights, in pixels; the middle if there are none."""
    height, width = weight.shape[-2:]
    area = weight.sum((1, 2)) + TINY
    x, y = (torch.arange(side).to(weight) + 0.5 for side in (width, height))
    middle = weight.new_tensor([width / 2, height / 2])
    sums = torch.stack([weight.sum(1) @ x, weight.sum(2) @ y], 1)
    return (sums + TINY * middle) / area[:, None], area


def _relative_distance(weight: Tensor, template: Tensor) -> Tensor:
    difference = (weight - template).square().sum((1, 2))
    return difference / ((weight.square() + template.square()).sum((1, 2)) + TINY)
