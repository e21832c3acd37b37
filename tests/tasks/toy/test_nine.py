"""The 25 -> 9 toy and the rare mode: their densities, bounds and metrics."""

import math

import pytest
import torch
from torch import Generator, Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from rtb_rl.tasks.toy import (
    SCALE,
    Toy,
    nine_of_twenty_five,
    plotting_coordinates,
    rare_mode,
    shared_spread,
    twenty_five,
)

MEANS = [(-10, -5), (-5, -10), (-5, 0), (10, -5), (0, 0), (0, 5), (5, -5), (5, 0), (5, 10)]
WEIGHTS = [4, 10, 4, 5, 10, 5, 4, 15, 4]


def small():
    generator = Generator().manual_seed(0)
    posterior = shared_spread(width=8, blocks=1, generator=generator)
    return {"levels": 5, "posterior": posterior, "generator": generator}


@pytest.fixture(scope="module")
def nine() -> Toy:
    return nine_of_twenty_five(**small())


@pytest.fixture(scope="module")
def rare() -> Toy:
    return rare_mode(prior_mass=1e-3, posterior_mass=0.4, **small())


def published(means: list, weights: list) -> MixtureSameFamily:
    """The mixture in the coordinates of the paper."""
    centres = torch.tensor(means, dtype=torch.float64)
    law = Independent(Normal(centres, math.sqrt(0.3)), 1)
    return MixtureSameFamily(Categorical(torch.tensor(weights, dtype=torch.float64)), law)


def test_the_reward_is_the_ratio_of_the_published_densities(nine: Toy):
    x = 8 * torch.randn((200, 2), generator=Generator().manual_seed(0), dtype=torch.float64)
    grid = [(a, b) for a in (-10, -5, 0, 5, 10) for b in (-10, -5, 0, 5, 10)]
    expected = published(MEANS, WEIGHTS).log_prob(x) - published(grid, [1] * 25).log_prob(x)
    torch.testing.assert_close(
        nine.task.log_reward(x / SCALE, None), expected, rtol=1e-9, atol=1e-7
    )
    torch.testing.assert_close(plotting_coordinates(x / SCALE), x)


def test_log_z_is_zero_and_the_reward_at_most_375_over_61(nine: Toy):
    assert float(nine.log_z(None)) == pytest.approx(0, abs=1e-12)
    x = 3 * torch.randn((5000, 2), generator=Generator().manual_seed(0), dtype=torch.float64)
    assert float(nine.task.log_reward(x, None).max()) <= math.log(375 / 61) + 1e-9
    best = torch.tensor([[5.0, 0.0]], dtype=torch.float64) / SCALE
    assert float(nine.task.log_reward(best, None)) == pytest.approx(math.log(375 / 61), abs=1e-9)


def test_the_reward_is_finite_in_float32_where_no_mode_is_wanted(nine: Toy):
    log_reward = nine.task.log_reward(twenty_five().means.float(), None)
    assert log_reward.dtype == torch.float32
    assert bool(log_reward.isfinite().all())
    assert float(log_reward.min()) < -40


def test_the_modes_have_unit_variance_together():
    x = twenty_five().sample(50_000, generator=Generator().manual_seed(0))
    torch.testing.assert_close(x.std(0), torch.ones(2).double(), atol=0.02, rtol=0)


def at_modes(counts: list[int]) -> Tensor:
    """`counts` points on the nine wanted modes."""
    means = torch.tensor(MEANS, dtype=torch.float64) / SCALE
    return means.repeat_interleave(torch.tensor(counts), dim=0)


def test_tv_is_that_of_mode_frequencies(nine: Toy):
    assert nine.errors(at_modes(WEIGHTS), None)["tv"] == pytest.approx(0, abs=1e-12)
    moved = [*WEIGHTS]
    moved[0], moved[1] = moved[0] + 6, moved[1] - 6
    assert nine.errors(at_modes(moved), None)["tv"] == pytest.approx(6 / 61)
    uniform = nine.errors(twenty_five().means, None)["tv"]
    assert uniform == pytest.approx(sum(max(0.0, w / 61 - 1 / 25) for w in WEIGHTS))


def test_points_beyond_three_sigma_and_the_spread_within_modes(nine: Toy):
    sigma = math.sqrt(0.3) / SCALE
    inside, beyond = torch.tensor([2.9 * sigma, 0]), torch.tensor([0, -3.1 * sigma])
    centre = torch.tensor([[5.0, 0.0]]) / SCALE
    x = torch.cat([centre + inside, centre + inside, centre + inside, centre + beyond])
    found = nine.errors(x, None)
    assert found["outside"] == 0.25
    assert found["variance_ratio"] == pytest.approx((3 * 2.9**2 + 3.1**2) / 8, rel=1e-5)


def test_exact_draws_have_no_error(nine: Toy):
    assert nine.task.draw_target is not None
    x = nine.task.draw_target(None, 20_000, generator=Generator().manual_seed(0))
    found = nine.errors(x, None)
    assert found["tv"] < 0.015
    assert found["outside"] == pytest.approx(math.exp(-4.5), abs=0.003)
    assert found["variance_ratio"] == pytest.approx(1, abs=0.03)


def test_the_rare_mode_has_its_weights(rare: Toy):
    _, data = rare.task.draw_conditions(200_000, generator=Generator().manual_seed(0))
    assert data is not None and rare.task.draw_target is not None
    prior = rare.errors(data, None)
    assert prior["rare_weight"] == pytest.approx(1e-3, abs=3e-4)
    assert prior["rare_weight_error"] == pytest.approx(1, abs=0.01)
    target = rare.task.draw_target(None, 20_000, generator=Generator().manual_seed(0))
    assert rare.errors(target, None)["rare_weight"] == pytest.approx(0.4, abs=0.014)


def test_nothing_but_the_rare_mode_is_rewarded(rare: Toy):
    corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    log_reward = rare.task.log_reward(corners, None)
    odds = (0.4 / 0.6) * (0.999 / 1e-3)
    expected = torch.tensor([0.0, 0.0, 0.0, math.log(odds)])
    torch.testing.assert_close(log_reward, expected, atol=1e-5, rtol=1e-5)
    assert float(rare.log_z(None)) == pytest.approx(math.log(0.999 / 0.6), abs=1e-9)
