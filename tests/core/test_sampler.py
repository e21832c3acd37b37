"""Sampler: final points of rollouts, n for each row of the condition."""

import pytest
import torch
from torch import Generator

from rtb_rl.core import (
    GaussianDiffusion,
    ResampledSampler,
    Sampler,
    Schedule,
    conditions,
    cosine_schedule,
    rollout,
)
from rtb_rl.core.gaussian import small_spread
from rtb_rl.errors import InputError, NonFiniteError

SCHEDULE = cosine_schedule(6)
DIFFUSION = GaussianDiffusion(
    SCHEDULE, (2,), small_spread(SCHEDULE, floor=0.01), dtype=torch.float64
)
ROWS = torch.tensor([[-4.0, 1.0], [0.0, 2.0], [7.0, 3.0]], dtype=torch.float64)


def to_the_condition(x, level, condition):
    """The data of a condition is one point: the condition."""
    return condition["point"] if isinstance(condition, dict) else condition


def seeded() -> Generator:
    return Generator().manual_seed(0)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("condition", [ROWS, {"point": ROWS}])
def test_each_row_of_the_condition_gets_n_draws_of_its_own(condition, n):
    x = Sampler(DIFFUSION, to_the_condition).sample(condition, n, generator=seeded())
    assert x.shape == (3, n, 2)
    assert bool(((x - ROWS[:, None]).abs() < 0.01 * 5).all())


def test_draws_are_the_ends_of_rollouts():
    x = Sampler(DIFFUSION, to_the_condition).sample(ROWS, 4, generator=seeded())
    repeated = conditions.repeat(ROWS, 4)
    path = rollout(DIFFUSION, to_the_condition, repeated, 12, generator=seeded())
    assert torch.equal(x.reshape(12, 2), path.x0)


def test_without_condition():
    def half(x, level, condition):
        assert condition is None
        return x / 2

    x = Sampler(DIFFUSION, half).sample(None, 7, generator=seeded())
    assert x.shape == (7, 2)
    assert torch.equal(x, rollout(DIFFUSION, half, None, 7, generator=seeded()).x0)


def test_draws_carry_no_graph():
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    x = Sampler(DIFFUSION, lambda x, level, condition: weight * x).sample(
        None, 3, generator=seeded()
    )
    assert not x.requires_grad


ONE_STEP = GaussianDiffusion(
    Schedule(torch.tensor([1.0, 0.0], dtype=torch.float64)),
    (1,),
    torch.ones(1),
    dtype=torch.float64,
)


def at(value):
    return lambda x, level, condition: torch.full_like(x, value)


def test_resampled_draws_have_the_law_of_the_target_where_the_posterior_has_not():
    """Prior N(0, 1) and log r = x: the target is N(1, 1); the posterior is off by a half."""
    sampler = ResampledSampler(ONE_STEP, at(0.5), at(0.0), lambda x0, c: x0[:, 0], candidates=16)
    kept = sampler.sample(None, 4000, generator=seeded())
    assert kept.shape == (4000, 1)
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.05)
    assert float(kept.var()) == pytest.approx(1.0, abs=0.1)
    plain = Sampler(ONE_STEP, at(0.5)).sample(None, 4000, generator=seeded())
    assert abs(float(plain.mean()) - 1.0) > 0.4


def test_resampling_at_the_exact_posterior_repeats_nothing():
    sampler = ResampledSampler(ONE_STEP, at(1.0), at(0.0), lambda x0, c: x0[:, 0], candidates=2)
    kept = sampler.sample(ROWS, 50, generator=seeded())
    assert kept.shape == (3, 50, 1)
    assert all(len(row.unique()) == 50 for row in kept)


def test_too_few_effective_candidates_are_refused():
    sampler = ResampledSampler(
        ONE_STEP, at(0.0), at(0.0), lambda x0, c: 50 * x0[:, 0], candidates=2
    )
    with pytest.raises(ValueError, match="of 200 candidates are effective, fewer than the 100"):
        sampler.sample(None, 100, generator=seeded())


def test_rewards_that_can_t_weigh_candidates_are_refused():
    """Not resampled: NaN would keep the first candidate alone, n times."""

    def resampled(log_reward):
        sampler = ResampledSampler(ONE_STEP, at(0.5), at(0.0), log_reward, candidates=4)
        return sampler.sample(None, 3, generator=seeded())

    with pytest.raises(NonFiniteError, match="NaN or .inf at 1 of 12 points"):
        resampled(lambda x0, c: torch.where(torch.arange(len(x0)) == 5, torch.nan, x0[:, 0]))
    with pytest.raises(ValueError, match="all 12 candidates of a row have reward zero"):
        resampled(lambda x0, c: torch.full((len(x0),), -torch.inf))
    with pytest.raises(InputError, match=r"\(12, 1\) for 12 points"):
        resampled(lambda x0, c: x0)
