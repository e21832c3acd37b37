"""Calibration ranks against scipy and exact draws; the rows of the rare and amortised cases."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from rtb_rl.exactness import amortised, rare
from rtb_rl.exactness.fit import FAST
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for

TINY = replace(FAST, rare_mixes=("widened", rare.RECOMMENDED), rare_updates=2, amortised_updates=2)


@pytest.fixture
def few(monkeypatch):
    """Few levels, paths and draws."""
    for module, name, value in (
        (amortised, "LEVELS", 4),
        (amortised, "OBSERVATIONS", 20),
        (amortised, "COUNTED", 5),
        (amortised, "DRAWS", 50),
        (rare, "LEVELS", 4),
        (rare, "SETTINGS", replace(rare.SETTINGS, conditions=8, levels_per_path=2)),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("counts", [[20, 20, 20], [12, 31, 9, 28], [60, 0, 0]])
def test_chi_square_p_is_scipys(counts):
    p = amortised.chi_square_p(torch.tensor(counts))
    assert p == pytest.approx(max(stats.chisquare(counts).pvalue, 1e-12), rel=1e-9)


def test_a_hopeless_count_has_a_finite_inverse():
    assert amortised.chi_square_p(torch.tensor([10_000, 0])) == 1e-12


def test_ranks_of_x0_among_exact_draws_are_uniform_and_of_others_not(few):
    toy = amortised.observation_toy(0)
    generator = generator_for(0, "ranks")
    y, x0 = toy.task.draw_conditions(2000, generator=generator)
    assert x0 is not None and toy.task.draw_target is not None
    draws = toy.task.draw_target(y, amortised.RANKED, generator=generator)
    assert min(amortised.calibration_p(x0, draws)) > 0.001
    assert max(amortised.calibration_p(x0, draws + 0.1)) < 1e-6  # moved
    mean = draws.mean(1, keepdim=True)
    assert max(amortised.calibration_p(x0, mean + 0.8 * (draws - mean))) < 1e-6  # too narrow


def test_the_temperature_toy_covers_more_than_the_betas_reported(few):
    beta, _ = amortised.temperature_toy(0).task.draw_conditions(
        4000, generator=generator_for(0, "beta")
    )
    assert isinstance(beta, torch.Tensor)
    assert beta.min() == pytest.approx(amortised.BETAS[0] - amortised.MARGIN, abs=0.01)
    assert beta.max() == pytest.approx(amortised.BETAS[-1] + amortised.MARGIN, abs=0.01)


def test_the_untrained_posterior_weighs_its_draws_by_their_reward(few):
    """It is the prior, so nothing else is left of the log-weights, in the order of the draws."""
    toy = amortised.temperature_toy(0)
    beta = torch.tensor([[0.0], [1.0]])
    draws, weight = amortised.weighted_draws(
        toy, toy.task.posterior, beta, 500, generator=generator_for(0, "draws")
    )
    reward = toy.task.log_reward(draws.flatten(0, 1), beta.repeat_interleave(500, 0))
    torch.testing.assert_close(weight, reward.reshape(2, 500).double(), rtol=0, atol=1e-5)
    assert weight[0].abs().max() == 0


@pytest.mark.parametrize(
    ("case", "count"),
    [
        (amortised.calibration, 5),
        (amortised.temperature, 15),
        (rare.rare_mode_mixes, 4),
    ],
)
def test_rows(few, tmp_path, case, count):
    rows = case(Run(tmp_path, {}), TINY, 3)
    assert len({row["case"] for row in rows}) == len(rows) == count
    assert all(set(row) == {"case", "seed", "value", "bound"} for row in rows)
    assert all(row["seed"] == 3 and math.isfinite(row["value"]) for row in rows)
    assert any(row["bound"] is not None for row in rows)


def test_every_mix_has_as_many_paths():
    assert {mix.total for mix in rare.MIXES.values()} == {4}
