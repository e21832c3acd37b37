"""A world of coloured shapes with captions, and the closed form of what an image shows.

Images of 16 x 16 pixels show one shape of one colour: 4 colours x 3 shapes are 12 cells, of which
one is rare. What p(cell | image) is can be said without a network, by comparison with drawings of
every cell, so that a reward of it and the share of each cell among images have a reference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from rtb_rl.errors import InputError

# Colours and shapes are equally far from the mean image: a chain of few steps favours what is near.
SIZE = 16  # pixels a side
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.9, 0.1),
    "blue": (0.25, 0.25, 0.85),
    "yellow": (0.9, 0.9, 0.1),
}
SHAPES = ("circle", "square", "triangle")
CELLS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
RARE = ("yellow", "triangle")
WEIGHTS = tuple(0.1 if cell == RARE else 1.0 for cell in CELLS)
CELL_PROBS = tuple(weight / sum(WEIGHTS) for weight in WEIGHTS)

# A caption and its share. "" is what classifier-free guidance compares with (arXiv 2207.12598).
CAPTIONS = {
    "a {colour} {shape}": 0.5,
    "a {colour} shape": 0.125,
    "a {shape}": 0.125,
    "a shape": 0.125,
    "": 0.125,
}
WORDS = ("a", *COLOURS, *SHAPES, "shape")

BACKGROUND = 0.5  # grey, of every image
OFFSET = 1.5  # the centre is up to so many pixels off the middle, in either direction
RADIUS = (3.6, 4.8)  # of the circle, pixels; square and triangle have the same area
SHADE = (0.75, 1.0)  # how far the colour is from the background
SAMPLES = 4  # points a pixel in either direction

SIGMA = 0.2  # noise of a pixel's value, for which the closed form below holds
PLACES, RADII, SHADES = 5, 3, 3  # values in either direction and of each that it sums over


@dataclass(frozen=True, eq=False)
class ShapesReward:
    """log r = sum over cells of p(cell | image) `values`[cell], nats.

    `values`: [12], in the order of CELLS. What is asked for in the prompts doesn't matter.
    """

    values: Tensor
    differentiable = True

    def __post_init__(self):
        if self.values.shape != (len(CELLS),):
            raise InputError(
                f"the values of cells are {tuple(self.values.shape)}; give one for each of the"
                f" {len(CELLS)} cells"
            )

    def __call__(
        self, images: Tensor, prompts: Sequence[str] | None = None, metadata: Any = None
    ) -> Tensor:
        """log r of images in [0, 1]: [n]."""
        probs = cell_log_probs(images).exp()
        return probs @ self.values.to(probs)


def wanted(colour: str, shape: str, strength: float) -> Tensor:
    """Values of the cells for one that is wanted: 0 there, -strength / 2 where only the colour or
    the shape is right, -strength elsewhere. [12], nats.
    """
    _index(colour, shape)
    right = [((c == colour) + (s == shape)) / 2 for c, s in CELLS]
    return strength * (torch.tensor(right) - 1)


def facts() -> dict[str, Any]:
    """What makes this world, for the configuration of a run."""
    jitter = {"offset": OFFSET, "radius": RADIUS, "shade": SHADE}
    shares = {"cell_probs": CELL_PROBS, "captions": CAPTIONS}
    return {"colours": COLOURS, "shapes": SHAPES, "background": BACKGROUND, **jitter, **shares}


def draw_cells(n: int, *, generator: Generator) -> Tensor:
    """`n` cells by CELL_PROBS: int64 [n]."""
    return _draw(CELL_PROBS, n, generator)


def draw_images(cells: Tensor, *, generator: Generator) -> Tensor:
    """An image of each cell, with place, size and shade at random: [n, 3, 16, 16] in [0, 1]."""
    jitter = torch.rand((4, len(cells)), generator=generator, device=generator.device)
    centre = SIZE / 2 + OFFSET * (2 * jitter[:2].T - 1)
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * jitter[2]
    shade = SHADE[0] + (SHADE[1] - SHADE[0]) * jitter[3]
    cover = coverage(cells % len(SHAPES), centre, radius)
    colours = torch.tensor(list(COLOURS.values()), device=cells.device)
    return _painted(cover, colours[cells // len(SHAPES)], shade)


def draw_captions(cells: Tensor, *, generator: Generator) -> list[str]:
    """A caption of each cell, whole or with words dropped, by the shares of CAPTIONS."""
    kinds = _draw(tuple(CAPTIONS.values()), len(cells), generator).tolist()
    patterns, named = tuple(CAPTIONS), cells.tolist()
    return [fill(patterns[kind], cell) for kind, cell in zip(kinds, named, strict=True)]


def fill(pattern: str, cell: int) -> str:
    """A caption of CAPTIONS for a cell."""
    colour, shape = CELLS[cell]
    return pattern.format(colour=colour, shape=shape)


def caption(colour: str, shape: str) -> str:
    """The whole caption of a cell; InputError where the world has no such colour or shape."""
    return fill("a {colour} {shape}", _index(colour, shape))


def coverage(shape: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """The share of each pixel that a shape covers: [n, 16, 16] in [0, 1].

    `shape`: int64 [n], of SHAPES; `centre`: [n, 2], x and y, from the upper left corner, and
    `radius`: [n], of the circle of the same area, in pixels.
    """
    points = (torch.arange(SIZE * SAMPLES, device=centre.device) + 0.5) / SAMPLES
    x, y = ((points - centre[:, axis, None]) / radius[:, None] for axis in (0, 1))
    x, y = x[:, None, :].abs(), y[:, :, None]
    circle = x.square() + y.square() <= 1
    square = torch.maximum(x, y.abs()) <= math.sqrt(math.pi) / 2
    triangle = (y <= 1) & (x <= 0.582 * (y + 1.324))
    kind = shape[:, None, None]
    inside = torch.where(kind == 0, circle, torch.where(kind == 1, square, triangle))
    return inside.float().reshape(-1, SIZE, SAMPLES, SIZE, SAMPLES).mean((2, 4))


def templates() -> Tensor:
    """Drawings of every cell at a grid of places, sizes and shades: [12, 225, 3, 16, 16]."""
    place = SIZE / 2 + OFFSET * _middles(-1, 1, PLACES)
    kinds = torch.arange(float(len(SHAPES)))
    grid = torch.cartesian_prod(kinds, place, place, _middles(*RADIUS, RADII))
    cover = coverage(grid[:, 0].long(), grid[:, 1:3], grid[:, 3])
    cover = cover.reshape(len(SHAPES), -1, 1, SIZE, SIZE)
    colours = torch.tensor(list(COLOURS.values()))[:, None, None, None]
    drawn = _painted(cover, colours, _middles(*SHADE, SHADES))  # by colour, shape, place and size
    return drawn.reshape(len(CELLS), -1, 3, SIZE, SIZE)


def cell_log_probs(images: Tensor) -> Tensor:
    """log p(cell | image) where all cells are equally likely, normalised: [n, 12].

        p(image | cell) = mean over templates of N(image; template, SIGMA^2)

    `images`: [n, 3, 16, 16] in [0, 1]; differentiable in them. InputError for another shape.
    """
    if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
        raise InputError(
            f"images of shapes are [n, 3, {SIZE}, {SIZE}], these are {tuple(images.shape)}"
        )
    x = images.float().flatten(1)
    bank = templates().to(x).flatten(2).flatten(0, 1)
    # |x - t|^2 without |x|^2, which is the same for all templates
    fit = torch.addmm(-bank.square().sum(1) / 2, x, bank.T) / SIGMA**2
    return fit.reshape(len(x), len(CELLS), -1).logsumexp(2).log_softmax(1)


def cells(images: Tensor) -> Tensor:
    """The likeliest cell of each image: int64 [n]."""
    return cell_log_probs(images).argmax(1)


def _painted(cover: Tensor, colour: Tensor, shade: Tensor) -> Tensor:
    """The background, and over it the colour: [..., 3, 16, 16]."""
    contrast = shade[..., None] * (colour - BACKGROUND)
    return BACKGROUND + cover[..., None, :, :] * contrast[..., None, None]


def _draw(shares: tuple[float, ...], n: int, generator: Generator) -> Tensor:
    """`n` places of `shares`, which sum to one, by their probability: int64 [n]."""
    limits = torch.tensor(shares, dtype=torch.float64, device=generator.device).cumsum(0)
    drawn = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
    return torch.searchsorted(limits[:-1], drawn, right=True)


def _middles(low: float, high: float, count: int) -> Tensor:
    """The middles of so many equal parts of an interval: [count]."""
    return low + (high - low) * (torch.arange(count) + 0.5) / count


def _index(colour: str, shape: str) -> int:
    if (colour, shape) not in CELLS:
        raise InputError(
            f"there is no {colour} {shape}; colours are {', '.join(COLOURS)}, shapes"
            f" {', '.join(SHAPES)}"
        )
    return CELLS.index((colour, shape))
