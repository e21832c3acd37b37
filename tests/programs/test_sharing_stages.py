"""What programs take from each other: the stages they use, of the same critic, whole or not."""

import importlib
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny_budget import TINY

from rtb_rl.errors import InputError
from rtb_rl.rl import collect
from rtb_rl.rl.jobs import opening

pytestmark = pytest.mark.mujoco
CRITICS = """
class Slope:
    def __init__(self, slope): self.slope = slope
    def q(self, observation, action): return self.slope * action.sum(1)
    def v(self, observation): return 0 * observation.sum(1)
def up(): return Slope(5.0)
def down(): return Slope(-5.0)
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A Minari data set of random Hopper episodes, in a folder of its own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
    patch.setattr(opening, "budget_for", lambda name, tuning: TINY.with_beta(tuning.beta))
    yield collect("hopper-random", steps=600, seed=0)
    patch.undo()


@pytest.fixture(scope="module")
def main_run(dataset, tmp_path_factory):
    """A finished run of rtb_iql."""
    out = tmp_path_factory.mktemp("main") / "run"
    run("rtb_iql", dataset, out)
    return out


@pytest.fixture
def own_critics(tmp_path, monkeypatch):
    """A folder to work in, with my_critics.py."""
    (tmp_path / "my_critics.py").write_text(CRITICS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_critics", raising=False)


def run(program, dataset, out, **settings):
    module = importlib.import_module(f"rtb_rl.agents.{program}")
    module.main(module.Settings(dataset=dataset, out=out, seed=3, **settings))
    return json.loads((out / "results.json").read_text())


def weights(out, stage="posterior"):
    return (out / stage / "model.safetensors").read_bytes()


def test_two_critics_of_one_class_have_two_posteriors(dataset, own_critics, tmp_path):
    """By --stages, and where the critic of a run is edited."""
    shared = {"stages": tmp_path / "stages"}
    run("rtb_iql", dataset, tmp_path / "up", critic="my_critics:up", **shared)
    run("rtb_iql", dataset, tmp_path / "down", critic="my_critics:down", **shared)
    for stage in ("posterior", "iql"):
        assert weights(tmp_path / "up", stage) != weights(tmp_path / "down", stage)
    (tmp_path / "my_critics.py").write_text(CRITICS.replace("5.0", "50.0"))
    import my_critics  # pyright: ignore[reportMissingImports]

    importlib.reload(my_critics)
    with pytest.raises(InputError, match="another configuration: critic was"):
        run("rtb_iql", dataset, tmp_path / "up", critic="my_critics:up")


def test_only_stages_that_are_used_are_taken_over_and_counted(dataset, main_run, tmp_path):
    bc = run("diffusion_bc", dataset, tmp_path / "bc", share=main_run)
    assert set(bc["timings"]) == {"prior"} and weights(tmp_path / "bc", "prior")
    td3 = run("td3_bc", dataset, tmp_path / "td3", share=main_run, steps=8)
    assert set(td3["timings"]) == {"td3_bc"}


def test_a_policy_of_another_critic_is_not_taken_over(dataset, main_run, own_critics, tmp_path):
    """It was, then refused as one of another critic, and taken over again when it was removed."""
    given = {"share": main_run, "critic": "my_critics:up"}
    results = run("rtb_iql", dataset, tmp_path / "run", **given)
    assert list(results["methods"]) == ["prior", "iql", "best_of_n", "rtb"]
    assert weights(tmp_path / "run", "prior") == weights(main_run, "prior")
    assert weights(tmp_path / "run", "iql") != weights(main_run, "iql")
    assert not (tmp_path / "run" / "critic").exists()


def test_a_run_with_another_critic_or_prior_is_refused_first(dataset, main_run, tmp_path):
    out, only_critic = tmp_path / "out", tmp_path / "only_critic"
    shutil.copytree(main_run / "critic", only_critic / "critic")
    for share in (main_run, only_critic):
        words = "has another critic .critic.steps was 24 and is now 8.; .* leave --share out"
        with pytest.raises(InputError, match=f"--share {share} {words}"):
            run("rtb_iql", dataset, out, share=share, critic_steps=8)
    seeds = importlib.import_module("rtb_rl.agents.rtb_iql_seeds")
    with pytest.raises(InputError, match="has another prior .seed was 3 and is now 4."):
        seeds.main(seeds.Settings(dataset=dataset, share=main_run, out=out, seeds=(4, 3)))
    assert not out.exists()
    run("qgpo", dataset, out, share=main_run, critic_steps=8, steps=8)  # with a critic of its own
    assert weights(out, "prior") == weights(main_run, "prior")


def test_several_seeds_take_over_too(dataset, main_run, tmp_path):
    run_seeds = importlib.import_module("rtb_rl.agents.rtb_iql_seeds")
    given = {"dataset": dataset, "share": main_run, "out": tmp_path / "all"}
    run_seeds.main(run_seeds.Settings(seeds=(3,), **given))
    for stage in ("prior", "critic", "iql"):
        assert weights(tmp_path / "all" / "seed3", stage) == weights(main_run, stage)


def test_killed_while_it_takes_over_a_run_goes_on(dataset, main_run, tmp_path, monkeypatch):
    def killed(source, target, **_):
        Path(target).mkdir()
        shutil.copy(Path(source) / "results.json", target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copytree", killed)
        run("diffusion_bc", dataset, tmp_path / "bc", share=main_run)
    run("diffusion_bc", dataset, tmp_path / "bc", share=main_run)
    assert weights(tmp_path / "bc", "prior") == weights(main_run, "prior")


def test_a_curve_is_made_where_the_shared_stage_has_none(dataset, main_run, tmp_path, capsys):
    shared = {"stages": tmp_path / "stages"}
    assert run("iql", dataset, tmp_path / "plain", **shared)["curve"] == []
    assert len(run("iql", dataset, tmp_path / "curve", curve=3, **shared)["curve"]) == 3
    assert weights(tmp_path / "plain", "iql") == weights(tmp_path / "curve", "iql")
    capsys.readouterr()
    assert run("iql", dataset, tmp_path / "taken", curve=3, share=main_run)["curve"] == []
    told = " ".join(capsys.readouterr().out.split())
    assert "learning curve: 0 of 3 points" in told


class Elsewhere(torch.nn.Module):
    """A critic on a GPU, which there may be none of: it knows only where it was moved."""

    where = "cuda"

    def to(self, device):
        self.where = device
        return self

    def q(self, observation, action):
        assert self.where == "cpu"
        return action.sum(1)


def test_a_critic_that_was_trained_on_a_gpu_acts_on_the_cpu(dataset, main_run, tmp_path):
    from rtb_rl.agents import best_of_n

    settings = best_of_n.Settings(dataset=dataset, out=tmp_path / "run", seed=3, share=main_run)
    tuning = Path(best_of_n.__file__).with_name("rtb_iql.toml")
    job = opening.open_job(settings, program="best_of_n", method="best_of_n", tuning_file=tuning)
    job.prior()
    critic = Elsewhere()
    job.finish(["best_of_n"], critic=critic)
    assert critic.where == "cuda"


def test_numbers_that_no_run_can_have_are_refused_first(dataset, tmp_path):
    cases = [
        ("best_of_n", {"candidates": 0}, "--candidates is 0; give at least 1"),
        ("iql", {"curve": -1}, "--curve is -1; give at least 0"),
        ("rtb_amortised", {"beta": 20.0, "high": 10.0}, "beta 20 is outside the strengths 0.3 to"),
        ("rtb_amortised", {"beta": 0.1}, "beta 0.1 is outside the strengths 0.3 to 10"),
        ("td3_bc", {"steps": -5}, "steps=-5"),
        ("dql", {"steps": 0}, "steps=0"),
        ("dql", {"eta": math.nan}, "eta=nan"),
        ("dql", {"eta": math.inf}, "eta=inf"),
        ("td3_bc", {"alpha": math.nan}, "alpha=nan"),
        ("td3_bc", {"alpha": math.inf}, "alpha=inf"),
        ("qgpo", {"scale": math.nan}, "--scale is nan; give a finite number"),
        ("qgpo", {"scale": -math.inf}, "--scale is -inf; give a finite number"),
    ]
    for program, given, words in cases:
        with pytest.raises(InputError, match=words):
            run(program, dataset, tmp_path / "out", **given)
    iql = importlib.import_module("rtb_rl.agents.iql")
    with pytest.raises(InputError, match="--seed is -1; give at least 0"):
        iql.main(iql.Settings(dataset=dataset, out=tmp_path / "out", seed=-1))
    assert not (tmp_path / "out").exists()


def test_a_strong_beta_widens_the_strengths_trained_for(dataset, tmp_path):
    """Tables of beta = 20 were refused after the critic had been trained."""
    run("rtb_amortised", dataset, tmp_path / "run", beta=20.0)
    for place in ("config.json", "amortised/config.json"):
        config = json.loads((tmp_path / "run" / place).read_text())
        assert (config.get("settings") or config)["amortised"]["high"] == 20.0
