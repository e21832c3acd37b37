"""The world of shapes: its shares, its captions, and the closed form of what an image shows."""

import re
from collections import Counter

import pytest
import torch

from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image import shapes
from rtb_rl.tasks.text_to_image.shapes import (
    CAPTIONS,
    CELL_PROBS,
    CELLS,
    RARE,
    WORDS,
    ShapesReward,
    caption,
    cell_log_probs,
    cells,
    coverage,
    draw_captions,
    draw_cells,
    draw_images,
    templates,
    wanted,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world():
    """200 images of each cell."""
    drawn = torch.arange(12).repeat_interleave(200)
    return drawn, draw_images(drawn, generator=seeded(1))


def within_four_standard_errors(counts, probs):
    counts, probs = torch.as_tensor(counts).double(), torch.as_tensor(probs).double()
    n = counts.sum()
    return bool(((counts - n * probs).abs() <= 4 * (n * probs * (1 - probs)).sqrt()).all())


def test_cells_come_by_their_declared_probability():
    assert len(CELLS) == len(set(CELLS)) == 12
    assert sum(CELL_PROBS) == pytest.approx(1)
    counts = torch.bincount(draw_cells(50_000, generator=seeded()), minlength=12)
    assert within_four_standard_errors(counts, CELL_PROBS)


def test_one_cell_is_rare():
    rare = CELLS.index(RARE)
    others = {p for i, p in enumerate(CELL_PROBS) if i != rare}
    assert len(others) == 1
    assert CELL_PROBS[rare] == pytest.approx(others.pop() / 10) == pytest.approx(1 / 111)


def test_words_are_dropped_in_the_declared_shares():
    one = CELLS.index(("blue", "square"))
    drawn = draw_captions(torch.full((20_000,), one), generator=seeded())
    filled = [pattern.format(colour="blue", shape="square") for pattern in CAPTIONS]
    counts = Counter(drawn)
    assert set(counts) == set(filled)
    assert sum(CAPTIONS.values()) == 1
    assert within_four_standard_errors([counts[text] for text in filled], list(CAPTIONS.values()))


def test_captions_name_their_cell():
    drawn = draw_cells(500, generator=seeded())
    for cell, text in zip(drawn.tolist(), draw_captions(drawn, generator=seeded()), strict=True):
        colour, shape = CELLS[cell]
        assert re.fullmatch(rf"(a ({colour} )?({shape}|shape))?", text)
        assert set(text.split()) <= set(WORDS)
    assert caption("red", "circle") == "a red circle"
    with pytest.raises(InputError, match="no pink circle; colours are red, green, blue, yellow"):
        caption("pink", "circle")


def test_the_same_generator_gives_the_same_images_and_another_one_others():
    drawn = torch.arange(12)
    images = draw_images(drawn, generator=seeded())
    assert images.equal(draw_images(drawn, generator=seeded()))
    assert not images.equal(draw_images(drawn, generator=seeded(1)))


def test_images_of_a_cell_differ_and_lie_in_range(world):
    _, images = world
    assert images.shape == (2400, 3, 16, 16) and images.dtype == torch.float32
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    assert len(images.unique(dim=0)) == len(images)
    border = torch.cat([images[..., 0, :], images[..., -1, :]], -1)
    assert float((border == shapes.BACKGROUND).float().mean()) > 0.9  # nothing is cut off


def test_shapes_have_the_same_area():
    kinds, radius = torch.arange(3), torch.full((3,), 4.5)
    area = coverage(kinds, torch.full((3, 2), 8.1), radius).sum((1, 2)) / 4.5**2
    assert area.tolist() == pytest.approx([torch.pi] * 3, rel=0.03)


def test_cells_are_equally_far_from_the_mean_image():
    drawn = draw_cells(8000, generator=seeded())
    images = draw_images(drawn, generator=seeded(1))
    distance = (images - images.mean(0)).flatten(1).square().sum(1)
    far = torch.stack([distance[drawn == cell].mean() for cell in range(12)])
    assert float(far.max() / far.min()) < 1.15


def test_the_closed_form_is_right_about_fresh_images(world):
    drawn, images = world
    log_probs = cell_log_probs(images)
    assert log_probs.exp().sum(1).allclose(torch.ones(len(images)), atol=1e-5)
    assert float((cells(images) == drawn).float().mean()) > 0.995
    assert float((log_probs.amax(1).exp() < 0.9).float().mean()) < 0.01


def test_the_closed_form_is_the_mixture_that_it_says(world):
    image = world[1][::199].double()
    bank = templates().double()
    law = torch.distributions.Normal(bank, shapes.SIGMA)
    expected = [(law.log_prob(one).sum((2, 3, 4)).logsumexp(1)).log_softmax(0) for one in image]
    torch.testing.assert_close(
        cell_log_probs(image.float()), torch.stack(expected).float(), atol=2e-3, rtol=1e-4
    )


def test_a_blend_of_two_cells_is_neither():
    pair = templates()[[0, 1], 112]  # a red circle and a red square at the same place
    weights = torch.linspace(0, 1, 21)[:, None, None, None]
    log_probs = cell_log_probs((1 - weights) * pair[0] + weights * pair[1])
    odds, probs = log_probs[:, 1] - log_probs[:, 0], log_probs.exp()
    assert bool((odds[1:] > odds[:-1]).all())  # smooth enough to climb
    assert float(probs[0, 0]) > 0.99 and float(probs[-1, 1]) > 0.99
    assert float(probs[:, :2].amax(1).min()) < 0.9


def test_the_reward_is_the_mean_of_its_values_and_differentiable(world):
    values = torch.linspace(-2, 0, 12)
    images = world[1][::150].clone().requires_grad_()
    reward = ShapesReward(values)
    log_r = reward(images, ["a shape"] * len(images), [{}] * len(images))
    torch.testing.assert_close(log_r, cell_log_probs(images).exp() @ values)
    assert reward.differentiable
    (gradient,) = torch.autograd.grad(log_r.sum(), images)
    step = 1e-2 * gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-9)[:, None, None, None]
    climbed = reward(images + step)
    slope = (gradient * step).flatten(1).sum(1)
    torch.testing.assert_close(climbed - log_r, slope, atol=3e-4, rtol=0.2)


def test_what_is_wanted_is_worth_most():
    values = wanted("red", "circle", 4.0)
    table = dict(zip(CELLS, values.tolist(), strict=True))
    assert table["red", "circle"] == 0
    assert table["red", "square"] == table["blue", "circle"] == -2
    assert table["blue", "square"] == -4
    with pytest.raises(InputError, match="no red cross"):
        wanted("red", "cross", 1.0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"\[n, 3, 16, 16\], these are \(2, 3, 8, 8\)"):
        cell_log_probs(torch.zeros(2, 3, 8, 8))
    with pytest.raises(InputError, match=r"\(3,\); give one for each of the 12 cells"):
        ShapesReward(torch.zeros(3))
