"""Scores of drawn figures: the right colour and the right shape, and their closed forms."""

import pytest
import torch

from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image.colours import COLOURS, ColourScore, foreground
from rtb_rl.tasks.text_to_image.outlines import OUTLINES, ShapeScore, coverage
from rtb_rl.tasks.text_to_image.rewards import CheckedReward

GROUND = (0.25, 0.75, 0.5)  # far enough from every colour of the table
INSIDE = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) <= 0.9,
    "triangle": lambda x, y: (y <= 0.8) & (2 * x.abs() <= y + 1.2),
    "cross": lambda x, y: (
        ((x.abs() <= 1) & (y.abs() <= 1 / 3)) | ((y.abs() <= 1) & (x.abs() <= 1 / 3))
    ),
    "diamond": lambda x, y: x.abs() + y.abs() <= 1,
}


def covered(shape, x, y, radius, side, samples=8):
    """The share of each pixel that a figure covers, by counting points: [side, side]."""
    points = (torch.arange(side * samples) + 0.5) / samples
    grid = torch.broadcast_tensors((points - x)[None, :] / radius, (points - y)[:, None] / radius)
    inside = INSIDE[shape](*grid).float()
    return inside.reshape(side, samples, side, samples).mean((1, 3))


def drawing(shape, colour, *place, side=16, ground=GROUND):
    """A figure on a plain ground, [3, side, side]; `place`: x, y and radius in pixels."""
    cover = covered(shape, *place, side)
    colour, ground = (torch.tensor(one)[:, None, None] for one in (colour, ground))
    return ground + cover * (colour - ground)


PLACES = [(8.0, 8.0, 4.0, 16), (7.1, 8.6, 3.0, 16), (9.2, 7.4, 5.5, 16), (13.3, 17.0, 9.0, 32)]


@pytest.mark.parametrize("place", PLACES)
def test_the_right_colour_scores_highest(place):
    *where, side = place
    for name, colour in COLOURS.items():
        image = drawing("circle", colour, *where, side=side)[None]
        scores = {other: float(ColourScore(other)(image, [""])) for other in COLOURS}
        best = max(scores.values())
        assert scores[name] == best > -0.12
        assert [other for other in scores if scores[other] == best] in ([name], ["grey", "gray"])


@pytest.mark.parametrize("place", PLACES)
def test_the_right_shape_scores_highest_by_far(place):
    *where, side = place
    for name in OUTLINES:
        image = drawing(name, COLOURS["red"], *where, side=side)[None]
        scores = {other: float(ShapeScore(other)(image, [""])) for other in OUTLINES}
        assert scores[name] > -0.015
        assert all(scores[other] < -0.02 for other in OUTLINES if other != name), scores


def test_a_flat_figure_has_its_distance_in_closed_form():
    # a square of whole pixels: no pixel is half figure
    image = torch.tensor(GROUND)[:, None, None].expand(3, 16, 16).clone()
    image[:, 4:10, 5:11] = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
    found = ColourScore("red", scale=2.0)(image[None], [""])
    distance, seen = 0.1**2 + 0.2**2 + 0.1**2, 36**2 / (36**2 + 1)
    assert float(found) == pytest.approx(-2 * (seen * distance + (1 - seen) * 3), rel=1e-4)
    same = ShapeScore("square", scale=2.0)(image[None], [""])
    assert float(same) == pytest.approx(-2 * (1 - seen), rel=0.01)


def test_stripes_are_not_the_colour_of_their_mean():
    image = torch.tensor(GROUND)[:, None, None].expand(3, 16, 16).clone()
    image[:, 4:12, 4:12] = torch.tensor(COLOURS["magenta"])[:, None, None] / 2
    plain = float(ColourScore("magenta")(image[None], [""]))
    image[:, 4:12, 4:8] = torch.tensor(COLOURS["red"])[:, None, None]
    image[:, 4:12, 8:12] = torch.tensor(COLOURS["blue"])[:, None, None]
    assert float(ColourScore("magenta")(image[None], [""])) < plain - 0.4


@pytest.mark.parametrize("shape", OUTLINES)
def test_the_foreground_and_the_template_are_the_share_of_a_pixel_that_is_covered(shape):
    share = covered(shape, 8.2, 7.7, 5.0, 16)
    image = drawing(shape, COLOURS["red"], 8.2, 7.7, 5.0)[None]
    assert float((foreground(image)[0] - share).abs().max()) < 0.12
    points = torch.arange(16) + 0.5
    centre = torch.stack([share.sum(0) @ points, share.sum(1) @ points]) / share.sum()
    template = coverage(OUTLINES[shape], centre[None], share.sum()[None], 16, 16)[0]
    assert float((template - share).abs().max()) < 0.25
    assert float(template.sum()) == pytest.approx(float(share.sum()), rel=0.02)


@pytest.mark.parametrize(
    ("score", "worst"), [(ColourScore("red", 2.0), -6.0), (ShapeScore("circle", 2.0), -2.0)]
)
def test_an_image_without_a_figure_has_the_worst_score(score, worst):
    noise = 0.03 * torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blank = (torch.full((1, 3, 16, 16), 0.4) + torch.cat([0 * noise, noise])).requires_grad_()
    found = score(blank, ["", ""])
    assert found[0].item() == pytest.approx(worst) and found[1].item() < 0.8 * worst
    (gradient,) = torch.autograd.grad(found.sum(), blank)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("score", [ColourScore("red"), ShapeScore("square")])
def test_scores_rise_along_their_gradient(score):
    image = drawing("circle", (0.6, 0.3, 0.2), 8.0, 8.0, 5.0)[None].double().requires_grad_()
    before, _ = CheckedReward(score)(image, ["a thing"])
    (gradient,) = torch.autograd.grad(before.sum(), image)
    length = float(gradient.norm())
    assert score.differentiable and before.dtype == torch.float64 and length > 0
    after = score(image.detach() + 1e-6 * gradient / length, ["a thing"])
    assert float(after - before.detach()) == pytest.approx(1e-6 * length, rel=0.01)


def test_words_are_found_in_each_prompt():
    figures = [("circle", "red"), ("triangle", "blue"), ("circle", "red")]
    images = torch.stack([drawing(s, COLOURS[c], 8.0, 8.0, 5.0) for s, c in figures])
    prompts = ["A RED circle", "one blue triangle, not a red square", "a green cross"]
    for score, words in (
        (ColourScore, ["red", "blue", "green"]),
        (ShapeScore, ["circle", "triangle", "cross"]),
    ):
        found = score()(images, prompts)
        alone = [score(word)(images[i : i + 1], [""]) for i, word in enumerate(words)]
        assert torch.allclose(found, torch.cat(alone), atol=1e-6)
        assert float(found[2]) < float(found[:2].min())


def test_words_that_are_not_there_are_refused():
    image = drawing("circle", COLOURS["red"], 8.0, 8.0, 5.0)[None]
    with pytest.raises(InputError, match="there is no colour 'mauve'"):
        ColourScore("mauve")
    with pytest.raises(InputError, match="there is no shape 'heart'"):
        ShapeScore("heart")
    with pytest.raises(InputError, match="'a thing' names no colour"):
        ColourScore()(image, ["a thing"])
    with pytest.raises(InputError, match="1 images came with 2 prompts"):
        ShapeScore()(image, ["a circle", "a square"])
    own = ColourScore("mauve", colours={"mauve": (0.88, 0.69, 1.0)})
    assert float(own(image, [""])) < -0.5
