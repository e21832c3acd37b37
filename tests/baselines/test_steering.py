"""Sequential Monte Carlo against the posterior of the same chain: log Z, moments, mode weights."""

import math

import pytest
import torch
from torch import Generator, Tensor

from rtb_rl.baselines.draws import Draws
from rtb_rl.baselines.steering import (
    difference_potential,
    drawn_tokens,
    fk_steering,
    max_potential,
    predicted_mean,
    sum_potential,
    twisted_smc,
)
from rtb_rl.core import (
    FixedOrder,
    GaussianDiffusion,
    IndependentReveals,
    ScaledPrediction,
    cosine_schedule,
    linear_masking,
    zero_terminal_signal,
)
from rtb_rl.core.gaussian import large_spread
from rtb_rl.errors import InputError
from rtb_rl.tasks.toy import (
    GaussianDenoiser,
    GaussianMixture,
    chain_of,
    even_grid,
    squared_reward,
    terminal_density,
    tilt,
    token_task,
)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


SCHEDULE = zero_terminal_signal(cosine_schedule(8))
CHAIN = GaussianDiffusion(SCHEDULE, (1,), large_spread(SCHEDULE), dtype=torch.float64)
PRIOR = GaussianDenoiser(SCHEDULE, vector(1.0), vector(0.25))
REWARD = squared_reward(vector(3.0), vector(1.8))
TILTED, VALUE = tilt(chain_of(CHAIN, PRIOR), REWARD)
LOG_Z = float(VALUE.log_mean_exp())
POTENTIALS = [difference_potential, max_potential, sum_potential]


def log_reward(x0, condition):
    return REWARD(x0)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def scores(draws: Draws, exact: float) -> float:
    """How many standard errors the mean over rows of exp(log_z - exact) is from 1."""
    assert draws.log_z is not None
    log_z = draws.log_z
    ratio = (log_z - exact).exp()
    return abs(float(ratio.mean() - 1)) / (float(ratio.std()) / math.sqrt(len(ratio)))


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("particles", [2, 16])
def test_twisted_log_z_is_unbiased_however_often_particles_are_resampled(particles, threshold):
    rows = torch.zeros(4000 // particles, 1)
    draws = twisted_smc(
        CHAIN,
        PRIOR,
        log_reward,
        rows,
        particles,
        particles=particles,
        ess_threshold=threshold,
        generator=seeded(),
    )
    assert draws.log_z is not None and draws.log_z.shape == (len(rows),)
    assert scores(draws, LOG_Z) < 4


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_steered_log_z_is_unbiased_however_often_particles_are_resampled(potential, threshold):
    """A weight forgotten at a level without resampling would put log Z off by tenths of a nat."""
    rows, particles = torch.zeros(1000, 1), 8
    draws = fk_steering(
        CHAIN,
        PRIOR,
        log_reward,
        rows,
        particles,
        particles=particles,
        potential=potential,
        levels=(2, 5),
        ess_threshold=threshold,
        generator=seeded(),
    )
    assert scores(draws, LOG_Z) < 4
    assert draws.log_z is not None
    assert float((draws.log_z - LOG_Z).exp().mean()) == pytest.approx(1, abs=0.1)


def test_the_twisted_weights_have_less_spread_than_the_priors():
    def spread(method) -> float:
        rows = torch.zeros(400, 1)
        draws = method(CHAIN, PRIOR, log_reward, rows, 8, particles=8, generator=seeded())
        return float(draws.log_z.std())

    assert spread(twisted_smc) < 0.6 * spread(fk_steering)


@pytest.mark.parametrize("method", [twisted_smc, fk_steering])
def test_draws_have_the_moments_of_the_tilted_chain(method):
    mean, variance = TILTED.final(*VALUE.tilted_start())
    draws = method(CHAIN, PRIOR, log_reward, None, 12_000, particles=1000, generator=seeded())
    assert draws.x0.shape == (12_000, 1)
    prior_mean, _ = chain_of(CHAIN, PRIOR).final(vector(0.0), vector(1.0))
    assert abs(float(prior_mean - mean)) > 0.3
    assert float(draws.x0.mean()) == pytest.approx(float(mean), abs=0.02)
    assert float(draws.x0.var()) == pytest.approx(float(variance), rel=0.06)


def test_beta_tempers_the_reward():
    _, value = tilt(chain_of(CHAIN, PRIOR), squared_reward(vector(1.5), vector(1.8)))
    for method in (twisted_smc, fk_steering):
        rows = torch.zeros(300, 1)
        draws = method(CHAIN, PRIOR, log_reward, rows, 8, beta=0.5, particles=8, generator=seeded())
        assert scores(draws, float(value.log_mean_exp())) < 4


TWO_MODES = GaussianMixture(
    vector(0.7, 0.3), vector(-1.2, 1.2)[:, None], torch.full((2, 1, 1), 0.04)
)
MODES_SCHEDULE = zero_terminal_signal(cosine_schedule(20))
MODES_CHAIN = GaussianDiffusion(
    MODES_SCHEDULE, (1,), large_spread(MODES_SCHEDULE).clamp(min=0.05), dtype=torch.float64
)


def right_mode_reward(x0: Tensor, condition) -> Tensor:
    return 2 * (3 * x0[:, 0]).tanh()


@pytest.mark.parametrize("potential", POTENTIALS)
def test_both_modes_get_their_weight(potential):
    """Against the prior chain's own law on a grid: 0.7 and 0.3 become 0.04 and 0.96."""
    denoiser, grid = TWO_MODES.denoiser(MODES_SCHEDULE), even_grid()
    law = terminal_density(MODES_CHAIN, denoiser, grid).log() + right_mode_reward(grid[:, None], 0)
    exact = float(law.softmax(0)[grid > 0].sum())
    draws = fk_steering(
        MODES_CHAIN,
        denoiser,
        right_mode_reward,
        torch.zeros(20, 1),
        500,
        particles=500,
        potential=potential,
        levels=(4, 8, 12),
        generator=seeded(),
    )
    share = (draws.x0[:, :, 0] > 0).double().mean(1)
    assert exact > 0.9
    error = float(share.std()) / math.sqrt(len(share))
    assert float(share.mean()) == pytest.approx(exact, abs=4 * error + 0.002)
    assert error < 0.01
    assert scores(draws, float(law.logsumexp(0))) < 4


@pytest.mark.parametrize(
    "reveals", [IndependentReveals(linear_masking(3), 3), FixedOrder(torch.arange(3))]
)
def test_tokens_are_steered_alike(reveals):
    """Masked diffusion: log Z and the law of the sequences, both by enumeration."""
    toy = token_task(3, 3, reveals, generator=seeded(), reward_scale=1.0)
    task = toy.task
    draws = fk_steering(
        task.diffusion,
        task.prior,
        task.log_reward,
        torch.zeros(60, 1),
        100,
        particles=100,
        clean=drawn_tokens(mask=3),
        generator=seeded(),
    )
    assert scores(draws, float(toy.log_z(None))) < 4
    assert toy.errors(draws.x0.flatten(0, 1), None)["tv"] < 0.04
    assert draws.calls == task.diffusion.levels


def test_potentials_of_a_path():
    estimates = vector(-3.0, -1.0, -2.0)[:, None]
    assert float(difference_potential(estimates[:1])) == -3
    assert float(difference_potential(estimates)) == -1
    assert float(max_potential(estimates)) == -1
    assert float(sum_potential(estimates)) == -6


def test_calls_are_one_a_level_and_three_with_gradients():
    draws = fk_steering(CHAIN, PRIOR, log_reward, None, 8, generator=seeded())
    assert draws.calls == CHAIN.levels
    draws = twisted_smc(CHAIN, PRIOR, log_reward, torch.zeros(3, 1), 8, generator=seeded())
    assert draws.calls == 3 * CHAIN.levels
    assert draws.x0.shape == (3, 8, 1)


@pytest.mark.parametrize("method", [twisted_smc, fk_steering])
def test_a_row_does_not_depend_on_the_others(method):
    def towards(x0, condition):
        return -(x0 - condition).square().sum(1)

    rows = vector(0.0, 1.0)[:, None]
    pair = [
        method(CHAIN, PRIOR, towards, rows * other, 8, generator=seeded()) for other in (1.0, 9.0)
    ]
    assert torch.equal(pair[0].x0[0], pair[1].x0[0])
    assert not torch.equal(pair[0].x0[1], pair[1].x0[1])


def test_a_denoiser_may_scale_its_steps():
    """The same law written with a scaled prediction on a diffusion of half the spread."""
    half = CHAIN.with_spread(CHAIN.std[1:, 0] / 2)

    def scaled(x, level, condition):
        x0 = PRIOR(x, level, condition)
        return ScaledPrediction(x0, torch.full_like(x0, math.log(2)))

    for method in (twisted_smc, fk_steering):
        one = method(CHAIN, PRIOR, log_reward, None, 40, generator=seeded())
        two = method(half, scaled, log_reward, None, 40, generator=seeded())
        torch.testing.assert_close(one.x0, two.x0)
        torch.testing.assert_close(one.log_z, two.log_z)


def test_a_hard_constraint_is_met():
    """Minus infinity is a reward like another, but kills what is impossible only as it stands.

    Half of the prior's draws are above one, and fewer of the predicted ones.
    """

    def above_one(x0, condition):
        return torch.where(x0[:, 0] > 1.0, 0.0, -torch.inf)

    draws = fk_steering(CHAIN, PRIOR, above_one, None, 2000, particles=100, generator=seeded())
    assert bool((draws.x0 > 1).all())
    assert draws.log_z is not None
    assert -3 < float(draws.log_z) < math.log(0.5)


def test_draws_must_fill_populations():
    with pytest.raises(InputError, match="10 draws can't be made by populations of 4"):
        fk_steering(CHAIN, PRIOR, log_reward, None, 10, particles=4, generator=seeded())


def test_the_predicted_mean_is_one_point():
    x0 = torch.ones(2, 1)
    for prediction in (x0, ScaledPrediction(x0, x0)):
        assert predicted_mean(prediction, x0, generator=seeded()).shape == (1, 2, 1)
