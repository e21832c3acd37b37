"""Linear-Gaussian chains: the law of the data, closed forms, and a posterior without residual."""

import math

import pytest
import torch
from torch import Generator, Tensor

from rtb_rl.core import GaussianDiffusion, Sampler, Trajectory, log_ratio, log_weight, residual
from rtb_rl.errors import InputError
from rtb_rl.tasks.toy import (
    Quadratic,
    Toy,
    chain_of,
    exact_posterior,
    gaussian_chain,
    learned_spread,
    linear_reward,
    shared_spread,
    squared_reward,
)

MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
VARIANCE = torch.tensor([0.25, 0.8], dtype=torch.float64)
SLOPE = torch.tensor([1.2, -0.7], dtype=torch.float64)
CURVATURE = torch.tensor([3.0, 0.5], dtype=torch.float64)
GOAL = torch.tensor([1.8, 0.4], dtype=torch.float64)
LINEAR, SQUARED = linear_reward(SLOPE), squared_reward(CURVATURE, GOAL)
REWARDS = pytest.mark.parametrize("reward", [LINEAR, SQUARED], ids=["linear", "squared"])


def make(reward: Quadratic, levels: int = 10) -> Toy:
    posterior = shared_spread(width=8, generator=Generator().manual_seed(0))
    return gaussian_chain(MEAN, VARIANCE, reward, levels=levels, posterior=posterior)


def diffusion_of(toy: Toy) -> GaussianDiffusion:
    assert isinstance(toy.task.diffusion, GaussianDiffusion)
    return toy.task.diffusion


def posterior_moments(reward: Quadratic) -> tuple[Tensor, Tensor]:
    """Precision 1/v + k and mean (m/v + q) over it, for the reward -k x^2 / 2 + q x."""
    precision = 1 / VARIANCE + reward.curvature
    return (MEAN / VARIANCE + reward.slope) / precision, 1 / precision


@pytest.mark.parametrize("levels", [2, 5, 40])
def test_the_chain_has_the_law_of_the_data_at_every_number_of_levels(levels: int):
    toy = make(LINEAR, levels)
    chain = chain_of(diffusion_of(toy), toy.task.prior)
    final = chain.final(torch.zeros_like(MEAN), torch.ones_like(MEAN))
    torch.testing.assert_close(final, (MEAN, VARIANCE), rtol=1e-12, atol=1e-13)


def test_log_z_of_a_linear_reward_is_b_mean_plus_half_b_variance_b():
    expected = (SLOPE * MEAN + SLOPE**2 * VARIANCE / 2).sum()
    assert float(make(LINEAR).log_z(None)) == pytest.approx(float(expected), rel=1e-12)


def test_log_z_of_a_squared_reward_is_its_closed_form():
    scale = 1 + CURVATURE * VARIANCE
    expected = (-scale.log() / 2 - CURVATURE * (MEAN - GOAL) ** 2 / (2 * scale)).sum()
    assert float(make(SQUARED).log_z(None)) == pytest.approx(float(expected), rel=1e-12)


@REWARDS
def test_log_z_and_the_posterior_are_those_of_quadrature(reward: Quadratic):
    """One coordinate at a time, on a grid of ten standard deviations."""
    log_z, moments = 0.0, []
    for i, (m, v) in enumerate(zip(MEAN, VARIANCE, strict=True)):
        x = torch.linspace(-10, 10, 20_001, dtype=torch.float64) * v.sqrt() + m
        one = Quadratic(reward.curvature[i], reward.slope[i], reward.offset[i])
        log_density = -((x - m) ** 2) / (2 * v) - (2 * math.pi * v).log() / 2 + one(x[:, None])
        density = log_density.exp() * (x[1] - x[0])
        log_z += float(density.sum().log())
        share = density / density.sum()
        mean = (share * x).sum()
        moments.append((mean, (share * (x - mean) ** 2).sum()))
    assert float(make(reward).log_z(None)) == pytest.approx(log_z, abs=1e-9)
    found = torch.tensor(moments, dtype=torch.float64)
    torch.testing.assert_close(found, torch.stack(posterior_moments(reward), 1))


@REWARDS
@pytest.mark.parametrize("levels", [3, 10])
def test_the_exact_posterior_has_residual_zero_on_any_path(reward: Quadratic, levels: int):
    toy = make(reward, levels)
    task = toy.task
    assert toy.exact_posterior is not None
    noise = torch.randn(
        (levels + 1, 20, 2), generator=Generator().manual_seed(0), dtype=torch.float64
    )
    for path in (Trajectory(noise), Trajectory(5 * noise - 3)):
        ratio = log_ratio(task.diffusion, toy.exact_posterior, task.prior, path)
        weight = log_weight(task.log_reward(path.x0, None), ratio, 1.0)
        assert residual(toy.log_z(None), weight).abs().max() < 1e-10


@REWARDS
def test_the_exact_posterior_s_own_chain_ends_in_the_closed_form(reward: Quadratic):
    toy = make(reward)
    posterior, _ = exact_posterior(diffusion_of(toy), toy.task.prior, reward)
    tilted = chain_of(diffusion_of(toy), posterior)
    final = tilted.final(torch.zeros_like(MEAN), torch.ones_like(MEAN))
    torch.testing.assert_close(final, posterior_moments(reward))


@REWARDS
def test_target_draws_have_the_posterior_s_moments(reward: Quadratic):
    toy, n = make(reward), 40_000
    assert toy.task.draw_target is not None
    x = toy.task.draw_target(None, n, generator=Generator().manual_seed(1))
    mean, variance = posterior_moments(reward)
    assert x.shape == (n, 2)
    assert ((x.mean(0) - mean).abs() < 4 * (variance / n).sqrt()).all()
    assert ((x.var(0) / variance - 1).abs() < 4 * math.sqrt(2 / n)).all()
    assert max(toy.errors(x, None).values()) < 0.02


def test_errors_are_relative():
    """Draws moved a tenth of the way and widened: mean off by 0.1, variance by 0.2."""
    toy = make(LINEAR)
    shift = SLOPE * VARIANCE
    eps = torch.randn((1000, 2), generator=Generator().manual_seed(0), dtype=torch.float64)
    eps = (eps - eps.mean(0)) / eps.std(0)
    x = MEAN + shift + 0.1 * shift + (1.2 * VARIANCE).sqrt() * eps
    assert toy.errors(x, None) == pytest.approx({"mean": 0.1, "variance": 0.2})
    prior = MEAN + VARIANCE.sqrt() * eps
    assert toy.errors(prior, None) == pytest.approx({"mean": 1.0, "variance": 0.0})


def test_data_are_draws_of_the_prior():
    condition, x0 = make(LINEAR).task.draw_conditions(20_000, generator=Generator().manual_seed(0))
    assert condition is None and x0 is not None
    torch.testing.assert_close(x0.mean(0), MEAN.float(), atol=0.03, rtol=0)
    torch.testing.assert_close(x0.var(0), VARIANCE.float(), atol=0, rtol=0.05)


@pytest.mark.parametrize("maker", [shared_spread, learned_spread])
def test_a_posterior_starts_as_the_prior(maker):
    posterior = maker(width=8, generator=Generator().manual_seed(0))
    task = gaussian_chain(MEAN, VARIANCE, SQUARED, levels=6, posterior=posterior).task
    path = Trajectory(torch.randn((7, 16, 2), generator=Generator().manual_seed(1)))
    ratio = log_ratio(task.diffusion, task.posterior, task.prior, path)
    assert torch.equal(ratio, torch.zeros(16))
    draws = [
        Sampler(task.diffusion, model).sample(None, 8, generator=Generator().manual_seed(2))
        for model in (task.posterior, task.prior)
    ]
    torch.testing.assert_close(*draws)
    assert sum(p.requires_grad for p in task.posterior.parameters()) > 0


def test_a_reward_that_cannot_be_normalised_is_refused():
    with pytest.raises(InputError, match="curvature"):
        make(squared_reward(torch.tensor([-4.0, 0.0], dtype=torch.float64), GOAL))
