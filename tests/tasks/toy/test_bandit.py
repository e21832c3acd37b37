"""Contextual bandits, and what every continuous toy promises: log Z and the target, by weighing
draws of the prior.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Generator

from rtb_rl.core import GaussianDiffusion, Schedule, Trajectory, log_ratio
from rtb_rl.core.protocols import Condition
from rtb_rl.tasks.toy import (
    GaussianMixture,
    QuadraticBandit,
    Toy,
    gaussian_bandit,
    gaussian_chain,
    learned_spread,
    mixture_bandit,
    mixture_observation,
    mixture_one_observation,
    mixture_tilt,
    mixture_tilt_over_beta,
    nine_of_twenty_five,
    random_mixture,
    random_observation,
    random_tilt,
    rare_mode,
    squared_reward,
)
from rtb_rl.tasks.toy.bandit import MODE_SHIFT, MODE_STD, MODES, mode_values

LEVELS = 6
ONES = torch.ones(2, dtype=torch.float64)
POSTERIOR = learned_spread(width=8, blocks=1, generator=Generator().manual_seed(0))
MIXTURE = random_mixture(3, 4, generator=Generator().manual_seed(1))
SLOPE = random_tilt(MIXTURE, generator=Generator().manual_seed(2))
OPERATOR, NOISE = random_observation(MIXTURE, generator=Generator().manual_seed(3))


def settings() -> dict:
    return {
        "levels": LEVELS,
        "posterior": POSTERIOR,
        "generator": Generator().manual_seed(4),
    }


TOYS: dict[str, Callable[[], Toy]] = {
    "chain": lambda: gaussian_chain(
        ONES, ONES / 4, squared_reward(3 * ONES, 1.8 * ONES), levels=LEVELS, posterior=POSTERIOR
    ),
    "tilt": lambda: mixture_tilt(MIXTURE, SLOPE, **settings()),
    "tilt over beta": lambda: mixture_tilt_over_beta(MIXTURE, SLOPE, 0.3, 1.2, **settings()),
    "observation": lambda: mixture_observation(MIXTURE, OPERATOR, NOISE, **settings()),
    "one observation": lambda: mixture_one_observation(
        MIXTURE, OPERATOR, NOISE, torch.tensor([0.5, -0.5]), **settings()
    ),
    "nine": lambda: nine_of_twenty_five(**settings()),
    "rare mode": lambda: rare_mode(prior_mass=0.02, **settings()),
    "gaussian bandit": lambda: gaussian_bandit(levels=LEVELS, posterior=POSTERIOR),
    "mixture bandit": lambda: mixture_bandit(**settings()),
}


@pytest.fixture(scope="module", params=TOYS.values(), ids=list(TOYS))
def toy(request: pytest.FixtureRequest) -> Toy:
    return request.param()


def weighed_prior(toy: Toy, n: int) -> tuple[Condition, torch.Tensor, torch.Tensor]:
    """Conditions, a draw of the prior for each, and its weight r / Z."""
    condition, x0 = toy.task.draw_conditions(n, generator=Generator().manual_seed(5))
    assert x0 is not None
    if toy.task.name == "mixture_observation":  # its x0 knows y; that of another row does not
        x0 = x0.roll(1, 0)
    weight = (toy.task.log_reward(x0, condition).double() - toy.log_z(condition)).exp()
    return condition, x0.double(), weight


def test_log_z_normalises_the_prior_times_the_reward(toy: Toy):
    n = 100_000
    _, _, weight = weighed_prior(toy, n)
    assert float(weight.mean()) == pytest.approx(1, abs=4 * float(weight.std()) / math.sqrt(n))
    assert float(weight.std()) / math.sqrt(n) < 0.05


def test_target_draws_are_the_prior_s_draws_reweighed(toy: Toy):
    """First and second moments, mean over conditions."""
    n = 100_000
    condition, x0, weight = weighed_prior(toy, n)
    assert toy.task.draw_target is not None
    generator = Generator().manual_seed(6)
    target = toy.task.draw_target(condition, n if condition is None else 1, generator=generator)
    target = target.reshape(n, -1).double()
    for power in (1, 2):
        first, second = weight[:, None] * x0**power, target**power
        error = ((first.var(0) + second.var(0)) / n).sqrt()
        assert ((first.mean(0) - second.mean(0)).abs() < 4.5 * error).all()


def test_target_draws_have_small_errors_and_prior_draws_do_not(toy: Toy):
    generator = Generator().manual_seed(7)
    condition, _ = toy.task.draw_conditions(8, generator=generator)
    assert toy.task.draw_target is not None
    target = toy.task.draw_target(condition, 20_000, generator=generator)
    shape = (20_000,) if condition is None else (8, 20_000)
    assert target.shape == (*shape, *toy.task.diffusion.event_shape)
    errors = toy.errors(target, condition)
    name = "tv" if "tv" in errors else "mean"
    assert errors[name] < 0.02
    _, prior = toy.task.draw_conditions(20_000, generator=generator)
    assert prior is not None
    if condition is not None:
        prior = prior.expand(8, *prior.shape)
    assert toy.errors(prior, condition)[name] > 0.1


def test_the_posterior_starts_as_the_prior_and_log_z_has_a_row_each(toy: Toy):
    task = toy.task
    condition, x0 = task.draw_conditions(16, generator=Generator().manual_seed(8))
    assert x0 is not None and x0.dtype == torch.float32
    noise = torch.randn(LEVELS + 1, *x0.shape, generator=Generator().manual_seed(9))
    ratio = log_ratio(task.diffusion, task.posterior, task.prior, Trajectory(noise, condition))
    assert torch.equal(ratio, torch.zeros(16))
    assert toy.log_z(condition).shape == ((1,) if condition is None else (16,))
    assert task.log_reward(x0, condition).shape == (16,)


def test_the_data_point_of_an_observation_is_a_posterior_draw():
    """Over many y, its rank among target draws is uniform."""
    toy = TOYS["observation"]()
    y, x0 = toy.task.draw_conditions(1000, generator=Generator().manual_seed(10))
    assert x0 is not None and toy.task.draw_target is not None
    target = toy.task.draw_target(y, 99, generator=Generator().manual_seed(11))
    ranks = (target < x0[:, None]).sum(1)
    counts = torch.stack([torch.bincount(r // 10, minlength=10) for r in ranks.T])
    statistic = (counts - 100).square().sum(1) / 100
    assert float(statistic.max()) < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


def test_the_gaussian_bandit_by_quadrature():
    problem = QuadraticBandit()
    toy = gaussian_bandit(problem, levels=LEVELS, posterior=POSTERIOR)
    s = torch.tensor([[-0.9], [0.0], [0.7]], dtype=torch.float64)
    u = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    for i in range(3):
        m, v = problem.slope * s[i], problem.variance
        log_q = toy.task.log_reward(u[:, None], s[i].expand(len(u), 1))
        density = (log_q - (u - m) ** 2 / (2 * v) - math.log(2 * math.pi * v) / 2).exp()
        total = density.sum() * (u[1] - u[0])
        assert float(toy.log_z(s)[i]) == pytest.approx(float(total.log()), abs=1e-9)
        mean = float((density * u).sum() / density.sum())
        assert float(problem.posterior_mean(s)[i]) == pytest.approx(mean, abs=1e-9)
        variance = float((density * (u - mean) ** 2).sum() / density.sum())
        assert problem.posterior_variance == pytest.approx(variance, abs=1e-9)


def test_the_mixture_bandit_has_weights_exp_q():
    toy = TOYS["mixture bandit"]()
    assert toy.task.draw_target is not None
    s = torch.tensor([[-1.0], [0.2], [1.0]])
    expected = mode_values(s).softmax(1)
    draws = toy.task.draw_target(s, 50_000, generator=Generator().manual_seed(12))
    centres = torch.tensor(MODES) + MODE_SHIFT * s
    nearest = (draws - centres[:, None]).abs().argmin(-1)
    found = torch.stack([torch.bincount(row, minlength=3) for row in nearest]) / 50_000
    torch.testing.assert_close(found, expected.float(), atol=0.008, rtol=0)
    on_modes = torch.stack([toy.task.log_reward(c[:, None], s) for c in centres.T], dim=1)
    torch.testing.assert_close(on_modes, mode_values(s).float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gaussian bandit", "mixture bandit"])
def test_the_conditional_prior_is_the_denoiser_of_the_moved_data(name: str):
    task = TOYS[name]().task
    assert isinstance(task.diffusion, GaussianDiffusion)
    schedule = Schedule(task.diffusion.signal.flatten())
    x = torch.randn((LEVELS, 1), generator=Generator().manual_seed(13), dtype=torch.float64)
    level = torch.arange(1, LEVELS + 1)
    means, variance, slope = {
        "gaussian bandit": ([0.0], 0.25, 0.8),
        "mixture bandit": (list(MODES), MODE_STD**2, MODE_SHIFT),
    }[name]
    s, count = torch.tensor(0.6, dtype=torch.float64), len(means)
    moved = GaussianMixture(
        torch.full((count,), 1 / count, dtype=torch.float64),
        torch.tensor(means, dtype=torch.float64)[:, None] + slope * s,
        torch.full((count, 1, 1), variance, dtype=torch.float64),
    )
    found = task.prior(x, level, s.expand(LEVELS, 1)).x0
    torch.testing.assert_close(found, moved.denoiser(schedule)(x, level, None))
