"""Regressions on other actions: the same one but for the actions, and refused without a run."""

import json

import pytest
import torch
from rtb_rl.agents import iql, rtb_iql
from rtb_rl.benchmarks import regressions
from tiny_budget import TINY

from rtb_rl.errors import InputError
from rtb_rl.rl import collect
from rtb_rl.rl.jobs import opening
from rtb_rl.rl.jobs.saved import load_gaussian, load_posterior, load_prior

pytestmark = pytest.mark.mujoco


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of rtb_iql and one of iql, on 600 transitions of random Hopper."""
    root, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    patch.setenv("MINARI_DATASETS_PATH", str(root / "minari"))
    patch.setattr(opening, "budget_for", lambda name, tuning: TINY.with_beta(tuning.beta))
    given = {"dataset": collect("hopper-random", steps=600, seed=0), "seed": 3}
    rtb_iql.main(rtb_iql.Settings(out=root / "rtb_iql", **given))
    iql.main(iql.Settings(out=root / "iql", **given))
    yield root
    patch.undo()


def test_of_the_data_it_is_the_runs_own_policy_and_nothing_is_done_twice(runs, tmp_path):
    chosen = {"sources": ("data-weighted", "rtb"), "seeds": (3, 4), "episodes": 2}
    settings = regressions.Settings(run=runs / "rtb_iql", out=tmp_path, **chosen)
    regressions.main(settings)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["source"], row["seed"]) for row in rows] == [
        ("data-weighted", 3),
        ("rtb", 3),
        ("data-weighted", 4),
        ("rtb", 4),
    ]
    assert [row["gaussian"]["temperature"] for row in rows] == [3.0, 0.0, 3.0, 0.0]
    own, again = (
        load_gaussian(runs / "rtb_iql" / "iql"),
        load_gaussian(tmp_path / "data-weighted-3"),
    )
    assert all(map(torch.equal, own.parameters(), again.parameters()))
    written = (tmp_path / "data-weighted-3" / "manifest.json").read_text()
    regressions.main(settings)
    assert (tmp_path / "data-weighted-3" / "manifest.json").read_text() == written
    assert "| rtb |" in (tmp_path / "table.md").read_text()


def test_actions_are_draws_of_prior_and_posterior_in_the_states_of_the_data(runs, tmp_path):
    given = regressions.open_run(regressions.Settings(run=runs / "rtb_iql", out=tmp_path))
    for source, model in (
        ("prior", load_prior(runs / "rtb_iql" / "prior")),
        ("rtb", load_posterior(runs / "rtb_iql")),
    ):
        data = regressions.with_actions_of(given, source, tmp_path)
        assert torch.equal(data.observations, given.dataset.observations)
        assert data.sha256 != given.dataset.sha256 and data.actions.abs().max() <= 1
        fresh = model.sampler.sample(
            data.observations, 1, generator=torch.Generator().manual_seed(0)
        ).clamp(-1, 1)[:, 0]
        error = (data.actions.std(0) ** 2 + fresh.std(0) ** 2).div(len(fresh)).sqrt()
        assert ((data.actions.mean(0) - fresh.mean(0)).abs() < 5 * error).all()


def test_episodes_and_steps_are_what_was_asked_for(runs, tmp_path):
    given = {"run": runs / "rtb_iql", "out": tmp_path, "sources": ("data",), "seeds": (0,)}
    regressions.main(regressions.Settings(**given, steps=8, episodes=1))
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").open())
    assert row["gaussian"]["steps"] == 8 and len(row["returns"]) == 1
    with pytest.raises(InputError, match="another configuration: episodes was 1 and is now 2"):
        regressions.main(regressions.Settings(**given, steps=8, episodes=2))
    with pytest.raises(InputError, match="another configuration: gaussian.steps was 8"):
        regressions.main(regressions.Settings(**given, episodes=1))


def test_runs_that_lack_something_are_refused(runs, tmp_path):
    for run, words in (
        (None, "--run None is no finished run"),
        (tmp_path, "no results.json"),
        (runs / "iql", "is of iql and has no posterior"),
    ):
        with pytest.raises(InputError, match=words):
            regressions.main(regressions.Settings(run=run, out=tmp_path / "out"))
    given = {"run": runs / "rtb_iql", "out": tmp_path / "out"}
    for changed, words in (
        ({"steps": 0}, "--steps is 0; give at least 1"),
        ({"episodes": 0}, "--episodes is 0; give at least 1"),
        ({"seeds": ()}, "--seeds is empty"),
        ({"sources": ()}, "--sources is empty"),
    ):
        with pytest.raises(InputError, match=words):
            regressions.main(regressions.Settings(**given, **changed))
    assert not (tmp_path / "out").exists()


def test_returns_are_not_called_scores_where_there_are_no_references():
    line = {"dataset": "pendulum", "source": "data", "gaussian": {"steps": 3}, "advantage": 0.5}
    told = regressions.table([{**line, "normalised_score": None, "mean_return": -1681.0}])
    assert "mean action, mean return of each seed" in told and "| data | -1681.0 |" in told
    told = regressions.table([{**line, "normalised_score": 0.0, "mean_return": -20.0}])
    assert "mean action, normalised score of each seed" in told and "| data | 0.0 |" in told
