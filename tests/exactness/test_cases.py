"""The cases of chains and tokens with very little work: names, finite values, what needs none."""

import math
from dataclasses import replace

import pytest
import torch

from rtb_rl.core import (
    IndependentReveals,
    MaskedDiffusion,
    Sampler,
    importance_log_z,
    linear_masking,
)
from rtb_rl.exactness import FAST
from rtb_rl.exactness.chains import BumpTable, learned_start, levels, linear_chain, starts
from rtb_rl.exactness.discrete import fixed_order, random_order, several_reveals
from rtb_rl.exactness.tables import FAMILIES, InconsistentTokens
from rtb_rl.tasks.toy.floors import learned_reveal, shared_schedule
from rtb_rl.training.run import Run

TINY = replace(FAST, line_levels=(3,), line_updates=4, token_updates=40, floor_instances=1)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, {"seed": 0})


def measured(rows) -> dict[str, float]:
    """Values by case, each once; all finite."""
    values = {row["case"]: row["value"] for row in rows}
    assert len(values) == len(rows)
    assert all(math.isfinite(value) for value in values.values())
    return values


def misses(rows) -> list[str]:
    bounded = [row for row in rows if row["bound"] is not None]
    assert bounded
    return [row["case"] for row in bounded if row["value"] > row["bound"]]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_linear_chain_is_exact(run, seed):
    rows = linear_chain(run, TINY, seed)
    assert len(measured(rows)) == 10 and misses(rows) == []
    assert min(row["value"] for row in rows if "float32" in row["case"]) > 1e-9


def test_both_starts_begin_as_the_prior_which_misses_the_whole_distance(run):
    values = measured(learned_start(run, replace(TINY, line_updates=2), 0))
    assert len(values) == 8
    for name, value in values.items():
        assert "variance" in name or value == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("start", ["prior", "learned"])
def test_log_z_of_a_chain_that_keeps_signal(start):
    toy = starts(0.674)[start]
    prior = Sampler(toy.task.diffusion, toy.task.prior)
    x0 = prior.sample(None, 100_000, generator=torch.Generator().manual_seed(0))
    estimate, error = importance_log_z(toy.task.log_reward(x0, None))
    assert abs(float(estimate - toy.log_z(None)[0])) < 4 * float(error) < 0.02


def test_levels_compare_trained_posteriors_with_their_floors(run):
    values = measured(levels(run, TINY, 0))
    for family in ("shared spread", "learned spread"):
        trained = values[f"levels: {family}, trained, T = 3"]
        floor = values[f"levels: {family}, floor, T = 3"]
        assert 0 < floor < trained < 1  # four updates
        assert values[f"{family}, T = 3: TV above the floor's"] == trained / floor - 1


def test_tokens_with_one_reveal_a_step(run):
    values = measured([*fixed_order(run, TINY, 0), *random_order(run.stage("random", {}), TINY, 0)])
    assert len(values) == 6
    assert values["tokens, fixed order, RTB: TV"] < 0.2
    control = "tokens, fixed order, published RL loss (control, must exceed 0.1): TV"
    assert values[control] > 0.1


def test_several_reveals(run):
    values = measured(several_reveals(run, replace(TINY, token_updates=3), 0))
    assert sum("reference" in name for name in values) == 18
    assert sum(name.endswith("trained: TV") for name in values) == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_token_tables_start_as_the_prior(family):
    diffusion = MaskedDiffusion(3, 2, IndependentReveals(linear_masking(3), 3))
    problem = InconsistentTokens(diffusion, generator=torch.Generator().manual_seed(0))
    toy = problem.toy(FAMILIES[family])
    x, level = problem.space.sequences, torch.full((27,), 2)
    kernels = [
        diffusion.kernel(denoiser(x, level, None), x, level)
        for denoiser in (toy.task.prior, toy.task.posterior)
    ]
    assert torch.equal(kernels[1].log_ratio(kernels[0], x), torch.zeros(27, dtype=torch.float64))
    target_is_exact = problem.error((problem.law.log() + problem.log_reward).softmax(0))
    assert target_is_exact < 1e-15
    assert 0 < problem.floor(learned_reveal) < problem.floor(shared_schedule)


def test_bumps_are_smooth_and_free_at_every_level():
    table = BumpTable(2, 1)
    table.weights.data[1, :, 0] = table.centres  # level 1: the identity; level 2: zero
    x = torch.linspace(-3, 3, 31)[:, None]
    torch.testing.assert_close(table(x, torch.full((31,), 1), None), x, rtol=0, atol=1e-3)
    assert torch.equal(table(x, torch.full((31,), 2), None), torch.zeros(31, 1))
