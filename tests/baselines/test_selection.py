"""Best of N by order statistics, importance resampling, and the error bars of the reference."""

import math

import pytest
import torch
from torch import Generator, Tensor

from rtb_rl.baselines.selection import (
    ImportanceReference,
    best_of_n,
    importance_reference,
    importance_resampling,
)
from rtb_rl.core import (
    FixedOrder,
    GaussianDiffusion,
    Schedule,
    cosine_schedule,
    systematic_resampling,
    zero_terminal_signal,
)
from rtb_rl.core.gaussian import large_spread
from rtb_rl.tasks.toy import GaussianDenoiser, chain_of, squared_reward, tilt, token_task

ONE_STEP = GaussianDiffusion(
    Schedule(torch.tensor([1.0, 0.0], dtype=torch.float64)),
    (1,),
    torch.ones(1),
    dtype=torch.float64,
)


def standard(x: Tensor, level: Tensor, condition) -> Tensor:
    """Data N(0, 1), moved by the condition."""
    return torch.zeros_like(x) if condition is None else condition


def linear(x0: Tensor, condition) -> Tensor:
    return x0[:, 0]


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.mark.parametrize("candidates", [2, 8])
def test_the_best_of_n_is_an_order_statistic(candidates):
    """The maximum of N draws has distribution function F^N, hence density N F^(N-1) p."""
    draws = best_of_n(
        ONE_STEP, standard, linear, None, 8000, candidates=candidates, generator=seeded()
    )
    assert draws.x0.shape == (8000, 1)
    log_f = torch.special.log_ndtr(draws.x0[:, 0])
    uniform = (candidates * log_f).exp().sort().values
    steps = torch.arange(1, 8001) / 8000
    assert float((uniform - steps).abs().max()) < 1.63 / math.sqrt(8000)  # Kolmogorov, 1 %
    log_ratio = math.log(candidates) + (candidates - 1) * log_f
    kl = math.log(candidates) - (candidates - 1) / candidates
    error = float(log_ratio.std()) / math.sqrt(8000)
    assert float(log_ratio.mean()) == pytest.approx(kl, abs=4 * error)


SCHEDULE = zero_terminal_signal(cosine_schedule(8))
CHAIN = GaussianDiffusion(SCHEDULE, (1,), large_spread(SCHEDULE), dtype=torch.float64)
PRIOR = GaussianDenoiser(SCHEDULE, torch.ones(1).double(), torch.full((1,), 0.25).double())
REWARD = squared_reward(torch.full((1,), 3.0).double(), torch.full((1,), 1.8).double())
TILTED, VALUE = tilt(chain_of(CHAIN, PRIOR), REWARD)
LOG_Z = float(VALUE.log_mean_exp())


def log_reward(x0: Tensor, condition) -> Tensor:
    return REWARD(x0)


def test_resampled_draws_have_the_law_of_the_tilted_chain():
    mean, variance = TILTED.final(*VALUE.tilted_start())
    draws = importance_resampling(
        CHAIN, PRIOR, log_reward, None, 10_000, candidates=20_000, generator=seeded()
    )
    assert draws.x0.shape == (10_000, 1)
    assert float(draws.x0.mean()) == pytest.approx(float(mean), abs=0.02)
    assert float(draws.x0.var()) == pytest.approx(float(variance), rel=0.06)
    assert draws.log_z is not None and draws.ess is not None
    assert float(draws.log_z) == pytest.approx(LOG_Z, abs=0.04)
    assert draws.ess.shape == (1,) and 0.1 < float(draws.ess) < 1


def test_calls_are_counted_for_each_delivered_draw():
    rows = torch.zeros(3, 1)
    draws = best_of_n(CHAIN, PRIOR, log_reward, rows, 5, candidates=4, generator=seeded())
    assert draws.calls == 4 * CHAIN.levels
    assert draws.x0.shape == (3, 5, 1)
    draws = importance_resampling(
        CHAIN, PRIOR, log_reward, rows, 5, candidates=20, batch=7, generator=seeded()
    )
    assert draws.calls == 20 * CHAIN.levels / 5
    assert draws.x0.shape == (3, 5, 1)


def test_each_row_is_chosen_from_its_own_candidates():
    rows = torch.tensor([[-50.0], [0.0], [50.0]], dtype=torch.float64)
    for method in (best_of_n, importance_resampling):
        draws = method(
            ONE_STEP, standard, linear, rows, 40, candidates=500, batch=333, generator=seeded()
        )
        assert draws.x0.shape == (3, 40, 1)
        assert bool(((draws.x0[:, :, 0] - rows).abs() < 6).all())
        assert bool((draws.x0.mean(1) > rows + 0.5).all())


def test_without_condition_draws_are_made_in_batches_too():
    reference = importance_reference(
        ONE_STEP, standard, linear, None, 1000, batch=300, generator=seeded()
    )
    assert reference.x0.shape == (1, 1000, 1)
    assert len(reference.x0.unique()) == 1000
    assert torch.equal(reference.log_weight, reference.x0[:, :, 0])


def test_the_error_bars_of_the_reference_cover():
    """z-scores over repeats: of log Z, of the mean of x0, of the mean of x0^2."""
    mean, variance = TILTED.final(*VALUE.tilted_start())
    reference = importance_reference(
        CHAIN, PRIOR, log_reward, torch.zeros(600, 1), 400, generator=seeded()
    )
    values = torch.cat([reference.x0, reference.x0.square()], 2)
    found, error = reference.mean(values)
    exact = torch.cat([mean, variance + mean.square()])
    assert found.shape == error.shape == (600, 2)
    z = torch.cat(
        [
            ((reference.log_z - LOG_Z) / reference.standard_error)[:, None],
            (found - exact) / error,
        ],
        1,
    )
    assert bool(((z.std(0) - 1).abs() < 0.12).all())
    assert bool((z.mean(0).abs() < 0.25).all())
    assert float((z.abs() < 1.96).double().mean()) == pytest.approx(0.95, abs=0.02)


def test_beta_tempers_the_weights():
    exponent = 0.7
    reference = importance_reference(
        ONE_STEP, standard, linear, torch.zeros(50, 1), 400, beta=exponent, generator=seeded()
    )
    exact = exponent**2 / 2
    z = (reference.log_z - exact) / reference.standard_error
    assert abs(float(z.mean())) < 4 / math.sqrt(50)
    ess = 1 / (reference.log_weight.softmax(1).square().sum(1) * 400)
    torch.testing.assert_close(reference.ess, ess)


def test_halves_are_disjoint_and_agree():
    reference = importance_reference(
        CHAIN, PRIOR, log_reward, torch.zeros(2, 1), 2001, generator=seeded()
    )
    halves = reference.split()
    assert [half.log_weight.shape for half in halves] == [(2, 1000), (2, 1001)]
    assert torch.equal(torch.cat([half.x0 for half in halves], 1), reference.x0)
    (first, one), (second, two) = (half.mean(half.x0[..., 0]) for half in halves)
    assert bool(((first - second).abs() < 4 * (one.square() + two.square()).sqrt()).all())


def test_tokens_are_resampled_alike():
    order = FixedOrder(torch.arange(3))
    toy = token_task(3, 3, order, generator=seeded(), reward_scale=1.0)
    task = toy.task
    draws = importance_resampling(
        task.diffusion,
        task.prior,
        task.log_reward,
        None,
        5000,
        candidates=20_000,
        generator=seeded(),
    )
    assert toy.errors(draws.x0, None)["tv"] < 0.04
    assert draws.log_z is not None
    assert float(draws.log_z) == pytest.approx(float(toy.log_z(None)), abs=0.05)
    best = best_of_n(task.diffusion, task.prior, task.log_reward, None, 9, generator=seeded())
    assert best.x0.shape == (9, 3) and best.calls == 8 * task.diffusion.levels


def test_systematic_resampling_keeps_every_weight_within_one_draw():
    weights = torch.rand((200, 7), generator=seeded(), dtype=torch.float64).softmax(1)
    index = systematic_resampling(weights, 10, generator=seeded(1))
    counts = torch.nn.functional.one_hot(index, 7).sum(1)
    assert bool((counts >= (10 * weights).floor()).all())
    assert bool((counts <= (10 * weights).ceil()).all())
    assert len({tuple(row.tolist()) for row in index}) > 190  # in random order
    single = ImportanceReference(torch.arange(7.0).expand(200, 7), weights.log())
    assert torch.equal(single.resample(10, generator=seeded(1)), index.to(torch.float32))
