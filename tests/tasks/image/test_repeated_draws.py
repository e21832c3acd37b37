"""Errors of draws that hang together: by weight from a pool, or of one population."""

import statistics

import pytest
import torch
from torch import Tensor

from rtb_rl.baselines import fk_steering
from rtb_rl.baselines.draws import Draws
from rtb_rl.baselines.selection import ImportanceReference, importance_resampling
from rtb_rl.core import GaussianDiffusion, cosine_schedule, zero_terminal_signal
from rtb_rl.core.gaussian import large_spread
from rtb_rl.tasks.image.evaluation import Row, average_rows, collapsed, excess
from rtb_rl.tasks.image.methods import Budget, swarm
from rtb_rl.tasks.image.metrics import clustered_error
from rtb_rl.tasks.text_to_image.evaluation import Measured, Reference, compare
from rtb_rl.tasks.toy import GaussianDenoiser

LEVELS, RUNS = 4, 200
SCHEDULE = zero_terminal_signal(cosine_schedule(LEVELS))
CHAIN = GaussianDiffusion(SCHEDULE, (1,), large_spread(SCHEDULE), dtype=torch.float64)
ROW = torch.ones(1, dtype=torch.float64)
PRIOR = GaussianDenoiser(SCHEDULE, 0 * ROW, ROW)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reward(x0: Tensor, condition: Tensor | None) -> Tensor:
    return 1.5 * x0[:, 0]


def rows_of_pools(candidates: int) -> list[Row]:
    """Exact importance resampling of 500 of a standard normal, against pools of 5,000."""
    generator, rows = seeded(), []
    for _ in range(RUNS):
        one, other = (
            1.5 * torch.randn((1, n), generator=generator, dtype=torch.float64)
            for n in (5000, candidates)
        )
        wanted = ImportanceReference(one, one).mean(one)
        found, source = ImportanceReference(other, other).resample_with_source(
            500, generator=generator
        )
        values = (each[0] for each in wanted)
        rows.append(excess("log_reward", found[0], *values, source[0]))
    return rows


@pytest.mark.parametrize("candidates", [500, 2000])
def test_exact_draws_by_weight_are_not_taken_for_collapsed(candidates):
    rows = rows_of_pools(candidates)
    real = statistics.stdev(float(row["log_reward"] or 0) for row in rows)
    said = statistics.fmean(float(row["log_reward_error"] or 0) for row in rows)
    assert said == pytest.approx(real, rel=0.35)
    assert sum(map(collapsed, rows)) / RUNS < 0.03


def test_a_method_says_which_candidate_each_draw_is():
    model = (CHAIN, PRIOR, reward, None)
    found = importance_resampling(*model, 300, candidates=40, generator=seeded())
    assert found.source is not None and len(found.source.unique()) < 40
    for number in found.source.unique():
        assert len(found.x0[found.source == number].unique()) == 1


def test_one_population_has_no_error_and_has_not_collapsed():
    budget = Budget(calls=2 * LEVELS, draws=50, levels=LEVELS)
    model = (CHAIN, PRIOR, reward, None)
    found = swarm(fk_steering, 1, *model, budget=budget, generator=seeded())
    assert found.source is not None and found.source.shape == (50,)
    row = excess("log_reward", 1e3 + found.x0[:, 0], 0 * ROW, 0 * ROW, found.source)
    assert row["log_reward_error"] is None and row["log_reward_excess"] is None
    assert collapsed(row) == 0 and average_rows([row, row])["log_reward_error"] is None


def test_the_error_over_populations_is_that_of_their_means():
    found = fk_steering(CHAIN, PRIOR, reward, None, 60, particles=4, generator=seeded())
    assert found.source is not None
    means = found.x0.reshape(15, 4).mean(1)
    error = clustered_error(found.x0[:, 0], found.source)
    assert error == pytest.approx(float(means.std()) / 15**0.5)
    alone = clustered_error(found.x0[:, 0], None)
    assert alone == pytest.approx(float(found.x0.std()) / 60**0.5)


def test_every_condition_has_its_own_sources():
    each = torch.zeros(2)
    found = fk_steering(CHAIN, PRIOR, reward, each, 6, particles=3, generator=seeded())
    assert [one.tolist() for one in found.sources(2) if one is not None] == [[0, 0, 0, 1, 1, 1]] * 2
    assert Draws(found.x0, 1.0).sources(2) == [None, None]


def test_text_to_image_treats_them_alike():
    features = torch.eye(6)
    measured = Measured(torch.arange(6.0), features, None)
    pool = ImportanceReference(features[None], torch.zeros(1, 6, dtype=torch.float64))
    row = compare(measured, Reference(pool, measured), torch.zeros(6))
    assert row["log_reward_error"] is None and row["diversity_error"] is None
    assert row["collapsed"] == 0
