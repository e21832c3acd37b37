"""Measures of extraction against Gaussians, whose divergence is known."""

import math

import pytest
import torch

from rtb_rl.errors import InputError
from rtb_rl.rl.posteriors.extraction import measure_extraction, nearest_neighbour_kl


def gaussians(mean, std, rows, n, size, generator):
    noise = torch.randn(rows, n, size, generator=generator, dtype=torch.float64)
    return mean + std * noise


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.7, 1.0), (0.3, 0.6)])
def test_of_gaussians_the_divergence_is_that_of_the_closed_form(mean, std):
    """KL = d (std^2 + mean^2 - 1 - 2 log std) / 2."""
    generator = torch.Generator().manual_seed(0)
    for size, low in ((1, 0.95), (3, 0.85), (6, 0.75)):
        x = gaussians(mean, std, 40, 1000, size, generator)
        y = gaussians(0.0, 1.0, 40, 1000, size, generator)
        exact = size * (std**2 + mean**2 - 1 - 2 * math.log(std)) / 2
        kl = nearest_neighbour_kl(x, y)
        assert low * exact - 0.03 < kl.mean() < 1.15 * exact + 0.03, size
    again = nearest_neighbour_kl(100 * x - 3, 100 * y - 3)
    assert torch.allclose(again, kl, atol=1e-3)  # units don't matter


class Linear:
    """Q = 2 a_0 + s; V = s."""

    def q(self, observation, action):
        return 2 * action[:, 0] + observation[:, 0]

    def v(self, observation):
        return observation[:, 0]


def test_the_advantage_is_that_of_the_draws():
    def draw(mean):
        return lambda observations, n, generator: gaussians(
            mean, 0.1, len(observations), n, 2, generator
        )

    found = measure_extraction(
        draw(0.4),
        draw(0.3),
        Linear(),
        torch.arange(50.0)[:, None],
        generator=torch.Generator().manual_seed(0),
    )
    assert found.advantage == pytest.approx(0.8, abs=0.01)
    assert found.kl == pytest.approx(1.0, rel=0.15)  # 2 (0.1 / 0.1)^2 / 2
    assert 0 < found.advantage_error < 0.01


def test_draws_without_a_density_and_too_few_are_refused():
    with pytest.raises(InputError, match="coincide"):
        nearest_neighbour_kl(torch.zeros(1, 20, 2), torch.randn(1, 20, 2))
    with pytest.raises(InputError, match="1 and 20 draws are too few"):
        nearest_neighbour_kl(torch.randn(1, 1, 2), torch.randn(1, 20, 2))
