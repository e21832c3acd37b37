import pytest
import torch

from rtb_rl.core import GaussianDiffusion, Sampler, log_snr_schedule, zero_terminal_signal
from rtb_rl.core.gaussian import calibrated_spread
from rtb_rl.tasks.toy.chain import (
    GaussianDenoiser,
    chain_of,
    exact_spread,
    linear_reward,
    squared_reward,
    tilt,
)
from rtb_rl.tasks.toy.enumeration import tilted, total_variation
from rtb_rl.tasks.toy.line import (
    calibrated_steps,
    even_grid,
    kolmogorov_distance,
    large_steps,
    line_chain,
    middle_class,
    small_steps,
    terminal_density,
    three_modes,
    three_modes_chain,
    three_modes_mixture,
)
from rtb_rl.tasks.toy.line_floors import (
    gaussian_floors,
    learned_spread,
    line_floor,
    matched_moments,
    shared_spread,
    solve,
)
from rtb_rl.tasks.toy.posterior import learned_spread as learned_spread_posterior

WIDE = torch.linspace(-12, 12, 601, dtype=torch.float64)
CENTRE = (WIDE.abs() < 2).nonzero().squeeze()
MEAN, VARIANCE = torch.tensor([0.3]).double(), torch.tensor([0.5]).double()


def gaussian_problem(levels):
    schedule = zero_terminal_signal(log_snr_schedule(levels, first_noise=0.3))
    spread = exact_spread(schedule, VARIANCE)
    diffusion = GaussianDiffusion(schedule, (1,), spread, dtype=torch.float64)
    return diffusion, GaussianDenoiser(schedule, MEAN, VARIANCE)


@pytest.mark.parametrize(
    "choose, reward",
    [
        (shared_spread, linear_reward(torch.tensor([0.8]).double())),
        (learned_spread, linear_reward(torch.tensor([0.8]).double())),
        (learned_spread, squared_reward(*torch.tensor([[2.0], [0.5]]).double())),
        (matched_moments, squared_reward(*torch.tensor([[2.0], [0.5]]).double())),
    ],
)
def test_the_best_value_of_a_gaussian_chain_is_the_closed_form(choose, reward):
    """Linear log r: the prior's spread is exact; quadratic: a learned one is."""
    diffusion, denoiser = gaussian_problem(4)
    prior = line_chain(diffusion, denoiser, WIDE)
    posterior, value = solve(prior, reward(WIDE[:, None]), choose)
    exact, exact_value = tilt(chain_of(diffusion, denoiser), reward)
    torch.testing.assert_close(value[CENTRE], exact_value(WIDE[CENTRE, None]), rtol=0, atol=1e-5)
    mean = exact.slope * WIDE[CENTRE] + exact.shift
    torch.testing.assert_close(posterior.mean[:, CENTRE], mean, rtol=0, atol=1e-4)
    std = exact.std.expand(-1, len(CENTRE))
    torch.testing.assert_close(posterior.std[:, CENTRE], std, rtol=0, atol=1e-4)


def test_the_prior_spread_is_too_wide_for_a_quadratic_log_reward():
    diffusion, denoiser = gaussian_problem(4)
    prior = line_chain(diffusion, denoiser, WIDE)
    log_reward = squared_reward(*torch.tensor([[2.0], [0.5]]).double())(WIDE[:, None])
    density = (-((WIDE - MEAN) ** 2) / (2 * VARIANCE)).softmax(0)
    shared, learned = (
        line_floor("", choose, prior, log_reward, density)
        for choose in (shared_spread, learned_spread)
    )
    assert shared.tv > 0.05 and shared.gap > 0.05
    assert learned.tv < 1e-5 and abs(learned.gap) < 1e-5
    assert learned.tv_data < 1e-5  # the chain has the law of its data


@pytest.mark.parametrize("spread", [small_steps, large_steps, calibrated_steps])
def test_the_terminal_density_is_that_of_the_draws(spread):
    posterior = learned_spread_posterior(generator=torch.Generator().manual_seed(0))
    toy = three_modes(8, spread=spread, posterior=posterior)
    diffusion, prior = toy.task.diffusion, toy.task.prior
    generator = torch.Generator().manual_seed(1)
    draws = Sampler(diffusion, prior).sample(None, 20_000, generator=generator)
    grid = even_grid()
    law = terminal_density(diffusion, prior, grid)
    assert abs(float(law.sum()) - 1) < 1e-12
    assert kolmogorov_distance(draws, law, grid) < 0.015


def test_three_modes_is_exact_about_its_target():
    posterior = learned_spread_posterior(generator=torch.Generator().manual_seed(0))
    toy = three_modes(10, posterior=posterior)
    task, grid = toy.task, even_grid()
    draws = task.draw_target(None, 20_000, generator=torch.Generator().manual_seed(1))
    assert draws.shape == (20_000, 1)
    assert toy.errors(draws, None)["kolmogorov"] < 0.015
    law = terminal_density(task.diffusion, task.prior, grid)
    expected = (law @ middle_class(grid).exp()).log()
    torch.testing.assert_close(toy.log_z(None), expected.reshape(1))
    before = total_variation(law, tilted(law, middle_class(grid)))
    start = task.evaluate(Sampler(task.diffusion, task.posterior))["tv"]
    assert before > 0.3 and abs(start - before) < 1e-5


def test_calibrated_steps_are_what_data_give():
    diffusion, denoiser = three_modes_chain(5, large_steps, torch.float64)
    generator = torch.Generator().manual_seed(0)
    x0 = three_modes_mixture().sample(100_000, generator=generator)
    estimate = calibrated_spread(diffusion, denoiser, x0, None, generator=generator)
    chain = three_modes_chain(5, calibrated_steps, torch.float64)[0]
    torch.testing.assert_close(chain.std[1:], estimate, rtol=0.02, atol=0)


def test_a_learned_spread_more_than_halves_the_floor_and_floors_fall():
    floors = gaussian_floors((10, 20, 40))
    by = {(f.family, f.levels): f for f in floors}
    for levels in (10, 20):
        shared, learned = by["shared spread", levels], by["learned spread", levels]
        assert learned.tv < shared.tv / 2 and learned.gap < shared.gap / 2
    for family in ("shared spread", "learned spread"):
        assert 1.5 < by[family, 20].gap / by[family, 40].gap < 3.5
    for floor in floors:
        assert 0 <= floor.tv <= (floor.gap / 2) ** 0.5  # Pinsker
    for levels in (10, 20, 40):
        assert by["learned spread", levels].gap <= by["matched moments", levels].gap
        assert by["learned spread", levels].gap <= by["shared spread", levels].gap
