"""What is no longer what a run was made with: evaluated again, or refused when it is opened."""

import importlib
import json
import shutil
import sys
from typing import Any

import numpy as np
import pytest
from tiny_budget import TINY

from rtb_rl.errors import InputError
from rtb_rl.rl import evaluate, load_policy
from rtb_rl.rl.jobs import opening

CRITIC = """
class Reach:
    def __init__(self, goal): self.goal = goal
    def q(self, observation, action): return -(action - self.goal).square().sum(1)
def make(): return Reach(1.0)
"""
OWN = "edited_critic:make"


def write_data(path, seed):
    random = np.random.default_rng(seed)
    ends = np.arange(200) % 40 == 39
    arrays: Any = dict(
        observations=random.normal(size=(200, 3)).astype(np.float32),
        actions=random.uniform(-2, 2, (200, 1)).astype(np.float32),
        rewards=random.normal(size=200).astype(np.float32),
    )
    np.savez(path, **arrays, terminals=np.zeros(200, bool), timeouts=ends)


def write_critic(folder, goal):
    (folder / "edited_critic.py").write_text(CRITIC.replace("1.0", goal))
    sys.modules.pop("edited_critic", None)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to work in, with data, a critic of one's own, and two finished runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "budget_for", lambda name, tuning: TINY.with_beta(tuning.beta))
        patch.setattr(sys, "path", list(sys.path))
        path = tmp_path_factory.mktemp("folder")
        patch.chdir(path)
        write_data(path / "mine.npz", seed=0)
        write_critic(path, "1.0")
        run("rtb_iql", path / "main")
        run("best_of_n", path / "own", critic=OWN)
        yield path


@pytest.fixture
def copy_of(folder, tmp_path):
    """A copy of one of the finished runs; data and critic are afterwards as before."""

    def copy(name):
        return shutil.copytree(folder / name, tmp_path / name)

    yield copy
    write_data(folder / "mine.npz", seed=0)
    write_critic(folder, "1.0")


def run(program, out, **settings):
    module = importlib.import_module(f"rtb_rl.agents.{program}")
    given = dict(dataset="mine.npz", env_id="Pendulum-v1", seed=3)
    module.main(module.Settings(out=out, **given, **settings))
    return json.loads((out / "results.json").read_text())["methods"]


def episodes_of(out, method):
    return evaluate(load_policy(out, method), "Pendulum-v1", episodes=2, seed=3).returns


def test_a_posterior_that_was_trained_anew_is_evaluated_anew(folder, copy_of):
    """The episodes of the old one were reported as its own."""
    out = copy_of("main")
    before = json.loads((out / "results.json").read_text())["methods"]
    kept = (out / "evaluation" / "prior.json").stat().st_mtime_ns
    shutil.rmtree(out / "posterior")
    after = run("rtb_iql", out, langevin=True)
    assert after["rtb"]["returns"] == episodes_of(out, "rtb") != before["rtb"]["returns"]
    assert all(after[name] == before[name] for name in ("prior", "iql", "best_of_n"))
    assert (out / "evaluation" / "prior.json").stat().st_mtime_ns == kept


def test_what_an_edited_critic_chooses_is_evaluated_anew(folder, copy_of):
    out = copy_of("own")
    before = json.loads((out / "results.json").read_text())["methods"]
    write_critic(folder, "-1.0")
    after = run("best_of_n", out, critic=OWN)
    assert after["best_of_n"]["returns"] == episodes_of(out, "best_of_n")
    assert after["best_of_n"]["returns"] != before["best_of_n"]["returns"]
    assert after["prior"] == before["prior"]


def test_a_file_of_an_older_version_is_evaluated_again(folder, copy_of):
    """It doesn't say what acted."""
    out = copy_of("own")
    path = out / "evaluation" / "prior.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({"returns": [0.0, 0.0]}))
    assert run("best_of_n", out, critic=OWN)["prior"]["returns"] == told["returns"]


def test_a_run_is_not_opened_with_another_critic_than_it_was_finished_with(folder, copy_of):
    out = copy_of("own")
    write_critic(folder, "-1.0")
    words = "make' is another critic now .* than the one that .*own was finished with .*; put back"
    with pytest.raises(InputError, match=words):
        load_policy(out)
    assert load_policy(out, "prior")
    results = json.loads((out / "results.json").read_text())
    del results["critic_sha256"]  # as older versions left it
    (out / "results.json").write_text(json.dumps(results))
    assert load_policy(out)


def test_a_run_is_not_opened_with_other_data_than_it_was_trained_on(folder, copy_of):
    out = copy_of("own")
    write_data(folder / "mine.npz", seed=1)
    with pytest.raises(
        InputError, match=r"mine.npz holds other data .* than the run .*; put the data of then"
    ):
        load_policy(out)


def test_a_posterior_goes_with_its_prior_and_with_the_critic_it_climbs(folder, copy_of):
    out = copy_of("main")
    shutil.rmtree(out / "posterior")
    run("rtb_iql", out, langevin=True)
    for stage in ("prior", "critic"):
        path = out / "posterior" / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, stage: "f" * 64}))
        with pytest.raises(InputError, match=f"posterior was fitted to another {stage} than"):
            load_policy(out, "rtb")
        path.write_text(json.dumps(config))
    assert load_policy(out, "rtb")


def test_a_run_that_was_interrupted_says_so_and_goes_on(folder, tmp_path, monkeypatch):
    """It said to remove the stage, and with it the training that would have gone on."""

    def stop(*given, **settings):
        raise KeyboardInterrupt

    out = tmp_path / "cut"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("rtb_rl.rl.posteriors.posterior.diagnose_policy", stop)
        run("rtb_iql", out)
    with pytest.raises(InputError, match="posterior is not finished .*run the same command again"):
        load_policy(out)
    assert load_policy(out, "prior") and load_policy(out, "iql")
    (out / "posterior").rename(tmp_path / "aside")
    with pytest.raises(InputError, match="cut is not finished"):
        load_policy(out)
    (tmp_path / "aside").rename(out / "posterior")
    assert run("rtb_iql", out) == run("rtb_iql", folder / "main")
