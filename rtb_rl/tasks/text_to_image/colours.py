"""The figure of a picture, and how near its colour is to one that has a name.

Closed forms of the pixels, with gradients: what a figure on a plain ground can be asked without a
network.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image.rewards import Metadata

COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "magenta": (1.0, 0.0, 1.0),
    "cyan": (0.0, 1.0, 1.0),
    "orange": (1.0, 0.5, 0.0),
    "purple": (0.5, 0.0, 0.5),
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
    "grey": (0.5, 0.5, 0.5),
    "gray": (0.5, 0.5, 0.5),
}
FARTHEST = 3.0  # squared distance between opposite corners of the colour cube
UNSEEN, SEEN = 0.1, 0.3  # distances to the ground: below is noise, a figure has at least the other
TINY = 1e-6  # pixels; no division by zero where there is no figure


def foreground(images: Tensor) -> Tensor:
    """The share of each pixel that the figure covers: [n, height, width] in [0, 1].

    The ground b is the median of the image's border, channel by channel; d is a pixel's distance to
    it, and c = sum d^5 / sum d^4 the figure's, a mean in which only the largest count. Then

        w = clamp((d - 0.1) / (max(c, 0.3) - 0.1), 0, 1)

    so that an edge pixel that is half figure counts about half, and noise on the ground not at all.
    A figure nearer than about 0.1 to the colour of its ground isn't seen. Gradients take the ground
    as given: a median would send all of them to one pixel of the border.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    edges = (images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1])
    ground = torch.cat(edges, -1).detach().median(-1).values[..., None, None]
    # the little number keeps the gradient finite where a pixel has exactly the colour of the ground
    distance = ((images - ground).square().sum(1) + 1e-12).sqrt()
    contrast = distance.pow(5).sum((1, 2)) / distance.pow(4).sum((1, 2))
    span = contrast.clamp(min=SEEN)[:, None, None] - UNSEEN
    return ((distance - UNSEEN) / span).clamp(0, 1)


def presence(weight: Tensor) -> Tensor:
    """How surely there is a figure: W^2 / (W^2 + 1) with W = sum w in pixels, [n].

    Below a pixel it is noise: 0.99 is reached at ten pixels, 0.01 at a tenth of one.
    """
    squared = weight.sum((1, 2)).square()
    return squared / (squared + 1)


@dataclass(frozen=True)
class ColourScore:
    """-`scale` times the mean squared distance of the figure's pixels to a colour, nats.

        log r = -scale (a sum_i w_i |p_i - colour|^2 / sum_i w_i + (1 - a) 3)

    with w of `foreground`, a of `presence` and pixels p in [0, 1]^3: an image without a figure gets
    the largest distance, 3. A mean of distances, not the distance of the mean: stripes of red and
    blue are not magenta. `colour`: a word of the table `colours`, or None for the first such word
    of each prompt. InputError for a colour that is not there.
    """

    colour: str | None = None
    scale: float = 1.0
    colours: Mapping[str, tuple[float, float, float]] = field(default_factory=lambda: COLOURS)
    differentiable = True

    def __post_init__(self):
        if self.colour is not None:
            check_word(self.colour, self.colours, "colour")

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        words = wanted_words(self.colour, self.colours, prompts, len(images), "colour")
        wanted = images.new_tensor([self.colours[word] for word in words])[:, :, None, None]
        weight = foreground(images)
        seen = presence(weight)
        sums = (weight * (images - wanted).square().sum(1)).sum((1, 2))
        distance = sums / (weight.sum((1, 2)) + TINY)
        return -self.scale * torch.lerp(torch.full_like(distance, FARTHEST), distance, seen)


def wanted_words(
    given: str | None, table: Mapping[str, object], prompts: Sequence[str], count: int, what: str
) -> list[str]:
    """The word that each of `count` images is judged by: `given`, or the prompt's first of `table`.

    InputError for a prompt without one.
    """
    if given is not None:
        return [given] * count
    if len(prompts) != count:
        raise InputError(f"{count} images came with {len(prompts)} prompts; give one an image")
    return [_first_word(prompt, table, what) for prompt in prompts]


def check_word(word: str, table: Mapping[str, object], what: str) -> None:
    """InputError for a word that is not in `table`."""
    if word not in table:
        raise InputError(f"there is no {what} {word!r}; choose among {', '.join(table)}")


def _first_word(prompt: str, table: Mapping[str, object], what: str) -> str:
    for word in re.findall(r"\w+", prompt.lower()):
        if word in table:
            return word
    raise InputError(
        f"the prompt {prompt!r} names no {what} of {', '.join(table)}; give the {what} to the"
        " score, or write it in the prompt"
    )
