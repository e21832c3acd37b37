"""Every offline-RL program runs whole, resumes exactly, and refuses bad input before it works."""

import importlib
import json
import re
from types import SimpleNamespace

import pytest
import torch
from rtb_rl.benchmarks import extraction
from tiny_budget import TINY

from rtb_rl.core import effective_sample_size
from rtb_rl.errors import InputError
from rtb_rl.rl import JobSettings, collect, evaluate, load_policy, read_tuning
from rtb_rl.rl.jobs import opening
from rtb_rl.rl.jobs.run_critic import load_iql_critic
from rtb_rl.rl.posteriors import posterior
from rtb_rl.training import Run, loop

pytestmark = pytest.mark.mujoco
PROGRAMS = {
    "rtb_iql": ["prior", "iql", "best_of_n", "rtb"],
    "diffusion_bc": ["prior"],
    "best_of_n": ["prior", "best_of_n"],
    "iql": ["iql"],
    "rtb_best_of_n": ["rtb", "rtb_best_of_n"],
    "rtb_amortised": ["prior", "rtb_amortised"],
    "rtb_soft": ["prior", "best_of_n", "rtb", "rtb_best_of_n"],
    "qgpo": ["qgpo"],
    "td3_bc": ["td3_bc"],
    "dql": ["dql"],
}
OWN_STEPS = ("td3_bc", "dql", "qgpo")  # programs with a table of their own of steps for each budget


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A Minari data set of random Hopper episodes, in a folder of its own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
    yield collect("hopper-random", steps=600, seed=0)
    patch.undo()


@pytest.fixture
def tiny(monkeypatch):
    """Tiny budgets, checkpoints every few steps."""
    monkeypatch.setattr(opening, "budget_for", lambda name, tuning: TINY.with_beta(tuning.beta))
    for program in OWN_STEPS:
        module = importlib.import_module(f"rtb_rl.agents.{program}")
        monkeypatch.setattr(module, "STEPS", dict.fromkeys(module.STEPS, 24))
    monkeypatch.setattr(posterior, "LOG_EVERY", 2)
    monkeypatch.setattr(posterior, "CHECKPOINT_EVERY", 4)
    often = {**loop.train.__kwdefaults__, "log_every": 4, "checkpoint_every": 8}
    monkeypatch.setattr(loop.train, "__kwdefaults__", often)


def run(program, dataset, out, **settings):
    module = importlib.import_module(f"rtb_rl.agents.{program}")
    module.main(module.Settings(dataset=dataset, out=out, seed=3, **settings))
    results = json.loads((out / "results.json").read_text())
    return {key: results[key] for key in ("methods", "diagnostics", "dataset", "versions")}


class KillAfter:
    """Lets a number of checkpoints be written, then stands in for SIGKILL."""

    def __init__(self, saves):
        self.left = saves
        self.save = Run.save

    def __call__(self, run, step, parts):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.save(run, step, parts)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_killed_again_and_again_ends_like_one_that_was_not(
    program, dataset, tiny, tmp_path, monkeypatch
):
    whole = run(program, dataset, tmp_path / "whole")
    assert list(whole["methods"]) == PROGRAMS[program]
    kills = 0
    while not (tmp_path / "cut" / "results.json").exists():
        with monkeypatch.context() as patch:
            kill = KillAfter(2)
            patch.setattr(Run, "save", lambda *a, kill=kill: kill(*a))
            try:
                run(program, dataset, tmp_path / "cut")
            except KeyboardInterrupt:
                kills += 1
    assert kills >= 1
    assert run(program, dataset, tmp_path / "cut") == whole
    stages = [path.parent.name for path in (tmp_path / "whole").glob("*/model.safetensors")]
    for stage in stages:
        for name in ("model.safetensors", "metrics.jsonl"):
            one, other = (tmp_path / side / stage / name for side in ("whole", "cut"))
            assert one.read_bytes() == other.read_bytes(), f"{stage}/{name}"


def test_results_hold_what_scripts_read(dataset, tiny, tmp_path):
    run("rtb_iql", dataset, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for row in results["methods"].values():
        assert len(row["returns"]) == 2
        low, high = row["normalised_score_interval"]
        assert low <= row["normalised_score"] <= high
    expected = {"elbo", "log_z", "log_z_standard_error", "ess", "residual_std"}
    assert expected <= set(results["diagnostics"])
    assert set(results["timings"]) == {"prior", "critic", "iql", "posterior"}
    assert results["dataset"]["env_id"] == "Hopper-v5"
    assert results["versions"]["torch"] == torch.__version__
    assert (tmp_path / "run" / "figure.png").stat().st_size > 10_000


def test_a_saved_policy_is_the_one_that_was_evaluated(dataset, tiny, tmp_path):
    results = run("rtb_iql", dataset, tmp_path / "run")
    for method in PROGRAMS["rtb_iql"]:
        policy = load_policy(tmp_path / "run", method)
        again = evaluate(policy, policy.env_id, episodes=2, seed=3)
        assert again.returns == results["methods"][method]["returns"], method


def test_other_programs_take_over_prior_and_critic(dataset, tiny, tmp_path):
    run("rtb_iql", dataset, tmp_path / "main")
    first = (tmp_path / "main" / "prior" / "model.safetensors").read_bytes()
    run("best_of_n", dataset, tmp_path / "other", share=tmp_path / "main")
    assert (tmp_path / "other" / "prior" / "model.safetensors").read_bytes() == first
    with pytest.raises(InputError, match="holds no complete"):
        run("best_of_n", dataset, tmp_path / "third", share=tmp_path / "nowhere")
    assert not (tmp_path / "third").exists()


def test_a_shared_run_of_other_data_is_refused_before_anything_is_written(dataset, tiny, tmp_path):
    """Other data by name, and other data of the same name."""
    main, out = tmp_path / "main", tmp_path / "out"
    run("diffusion_bc", dataset, main)
    name = re.escape(json.loads((main / "config.json").read_text())["dataset"])
    other = collect("hopper-random", steps=300, seed=1, dataset_id="other/hopper/random-v0")
    with pytest.raises(
        InputError,
        match=rf"main was trained on {name} and --dataset is {other}; give --dataset {dataset} or"
        " share a run of the same data",
    ):
        run("best_of_n", other, out, share=main)
    stage = main / "prior" / "config.json"
    stage.write_text(json.dumps({**json.loads(stage.read_text()), "data_sha256": "f" * 64}))
    with pytest.raises(
        InputError, match=rf"main was trained on other data of the name {name} than --dataset is;"
    ):
        run("best_of_n", dataset, out, share=main)
    assert not out.exists()


def test_a_shared_run_of_the_embedded_data_names_the_budget_that_collects_it(tmp_path):
    facts = {"dataset": "replay", "data_sha256": "0"}
    config = {**facts, "source": "local/hopper/medium-replay-9-v0", "budget": "demo"}
    (tmp_path / "prior").mkdir()
    for path in (tmp_path, tmp_path / "prior"):
        (path / "config.json").write_text(json.dumps(config))
        (path / "results.json").write_text("{}")
    data = SimpleNamespace(name="mine", sha256="1")
    for budget, words in (("demo", ""), ("full", " with --budget demo")):
        settings = JobSettings(share=tmp_path, dataset="mine.npz", budget=budget)
        with pytest.raises(InputError, match=f"; leave --dataset out{words} or share a run of the"):
            opening.check_shared(settings, data, "mine.npz")


def test_runs_share_stages_and_keep_the_curve_of_their_policy(dataset, tiny, tmp_path):
    """Two programs in one directory of stages: one critic, and weights as without sharing."""
    shared = {"stages": tmp_path / "stages", "curve": 2}
    alone = run("rtb_iql", dataset, tmp_path / "alone")
    assert run("iql", dataset, tmp_path / "iql", **shared)["methods"]["iql"]["returns"]
    again = run("rtb_iql", dataset, tmp_path / "rtb", **shared)
    assert again == alone
    assert len(list((tmp_path / "stages").rglob("critic-seed3-*/results.json"))) == 1
    for name, stage in (("iql", "iql"), ("rtb", "posterior")):
        results = json.loads((tmp_path / name / "results.json").read_text())
        steps = [point["step"] for point in results["curve"]]
        assert len(steps) == 2 and steps[1] == results["curve"][1]["steps"]
        assert results["best"] in results["curve"]
        assert results["curve"] == json.loads((tmp_path / name / stage / "curve.json").read_text())
        assert results["peak_memory_bytes"] > 1e8 and results["wall_seconds"] > 0


def test_what_methods_make_of_one_critic_is_measured_side_by_side(dataset, tiny, tmp_path):
    shared = {"stages": tmp_path / "stages"}
    run("rtb_iql", dataset, tmp_path / "main", **shared)
    run("rtb_best_of_n", dataset, tmp_path / "best", **shared)
    out, runs = tmp_path / "out", (tmp_path / "main", tmp_path / "best")
    extraction.main(extraction.Settings(runs=runs, out=out, fast=True))
    rows = {row["method"]: row for row in map(json.loads, (out / "rows.jsonl").open())}
    assert list(rows) == ["prior", "iql", "best_of_n", "rtb", "rtb_best_of_n"]
    assert rows["best_of_n"]["advantage"] > rows["prior"]["advantage"]
    assert abs(rows["prior"]["kl"]) < 5 * rows["prior"]["kl_error"]
    assert rows["rtb"]["ess"] and rows["rtb"]["path_kl"] is not None
    assert (out / "table.md").read_text().count("| iql |") == 1
    with pytest.raises(InputError, match="is no finished run"):
        extraction.main(extraction.Settings(runs=(tmp_path,), out=out))
    module = importlib.import_module("rtb_rl.agents.rtb_iql")
    given = module.Settings(dataset=dataset, out=tmp_path / "another", seed=4)
    module.main(given)
    with pytest.raises(InputError, match="runs are of 2 critics: .*main, .*another; give runs"):
        extraction.main(extraction.Settings(runs=(runs[0], given.out), out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_beta_by_rule_needs_a_critic_that_is_there(dataset, tiny, tmp_path):
    for rule in ("ess", "kl"):
        with pytest.raises(InputError, match="give --beta, or --critic-kind iql"):
            run("qgpo", dataset, tmp_path / "run", **{rule: 0.5})
    assert not (tmp_path / "run").exists()


def test_scales_of_the_guidance_share_critic_and_energy(dataset, tiny, tmp_path):
    """Scale 0 is the prior; what was fitted serves every scale; draws are not kept."""
    stages = tmp_path / "stages"
    returns = {
        scale: run("qgpo", dataset, tmp_path / f"scale{scale}", stages=stages, scale=scale)[
            "methods"
        ]["qgpo"]["returns"]
        for scale in (0.0, 1.0, 50.0)
    }
    assert len(list(stages.rglob("qgpo-seed3-*/results.json"))) == 1
    assert len(list(stages.rglob("soft_critic-seed3-*/results.json"))) == 1
    assert not list(tmp_path.rglob("actions_*.safetensors"))
    prior = load_policy(tmp_path / "scale1.0", "prior")
    assert evaluate(prior, "Hopper-v5", episodes=2, seed=3).returns == returns[0.0]
    assert returns[50.0] != returns[0.0]
    run("qgpo", dataset, tmp_path / "iql", stages=stages, critic_kind="iql", curve=1)
    assert (tmp_path / "iql" / "critic").exists() and not (
        tmp_path / "iql" / "soft_critic"
    ).exists()


def test_beta_follows_from_the_effective_sample_size_asked_for(dataset, tiny, tmp_path):
    run("rtb_iql", dataset, tmp_path / "run", ess=0.6)
    config = json.loads((tmp_path / "run" / "posterior" / "config.json").read_text())
    prior, critic = (
        load_policy(tmp_path / "run", "prior"),
        load_iql_critic(tmp_path / "run" / "critic"),
    )
    observations = torch.randn(200, 11, generator=torch.Generator().manual_seed(0))
    draws = prior.policy.sampler.sample(
        observations, 256, generator=torch.Generator().manual_seed(1)
    )
    q = critic.q(observations.repeat_interleave(256, 0), draws.flatten(0, 1).clamp(-1, 1))
    beta = config["posterior"]["finetune"]["beta"]
    ess = effective_sample_size(beta * q.double().reshape(200, 256)).mean()
    assert beta != 3.0 and ess == pytest.approx(0.6, abs=0.15)
    with pytest.raises(InputError, match="both given"):
        run("rtb_iql", dataset, tmp_path / "other", ess=0.6, beta=1.0)


def test_beta_follows_from_the_divergence_asked_for(dataset, tiny, tmp_path):
    """All strengths are trained for once, by --stages; the two programs take the same beta."""
    stages = tmp_path / "stages"
    run("rtb_iql", dataset, tmp_path / "run", kl=0.3, stages=stages, curve=1)
    results = run("rtb_amortised", dataset, tmp_path / "all", kl=0.3, stages=stages, curve=1)
    assert len(list(stages.rglob("amortised-seed3-*/results.json"))) == 1
    acting, posterior = (
        json.loads((tmp_path / place).read_text())
        for place in ("all/acting/results.json", "run/posterior/config.json")
    )
    beta = acting["beta"]
    assert 0.3 < beta <= 10 and posterior["posterior"]["finetune"]["beta"] == beta
    assert load_policy(tmp_path / "all").policy.beta == beta
    assert results["diagnostics"] == acting["diagnostics"]
    told = json.loads((tmp_path / "run" / "posterior" / "results.json").read_text())
    run_results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert run_results["diagnostics"] == told["diagnostics"]
    with pytest.raises(InputError, match="both given"):
        run("rtb_iql", dataset, tmp_path / "other", kl=0.5, beta=1.0)


@pytest.mark.parametrize("acting, points", [("rtb", 1), ("rtb_best_of_n", 0)])
def test_a_curve_of_one_draw_is_not_that_of_a_choice_among_several(
    dataset, tiny, tmp_path, acting, points
):
    run("rtb_soft", dataset, tmp_path / "run", acting=acting, curve=1, rows=100)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["curve"]) == points and (results["best"] is None) == (points == 0)


def test_a_critic_of_one_s_own_by_name(dataset, tiny, tmp_path, monkeypatch):
    (tmp_path / "my_critic.py").write_text(
        "class Small:\n"
        "    def q(self, observation, action):\n"
        "        return -action.square().sum(1)\n"
        "def make(dataset):\n"
        "    assert dataset.action_size == 3\n"
        "    return Small()\n"
        "def wrong():\n"
        "    return object()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    results = run("rtb_iql", dataset, tmp_path / "run", critic="my_critic:make")
    assert list(results["methods"]) == ["prior", "best_of_n", "rtb"]
    assert load_policy(tmp_path / "run", "best_of_n").env_id == "Hopper-v5"
    with pytest.raises(InputError, match="method q"):
        run("rtb_iql", dataset, tmp_path / "bad", critic="my_critic:wrong")
    assert not (tmp_path / "bad").exists()


def test_bad_input_is_refused_before_anything_is_written(dataset, tiny, tmp_path, capsys):
    cases = [
        (dict(env_id="HalfCheetah-v5"), "17"),
        (dict(env_id="Hoper-v5"), "Hopper-v5"),
        (dict(critic="nothing_here:make"), "nothing_here"),
        (dict(critic_steps=0), "--critic-steps is 0; give at least 1"),
        (dict(critic_steps=9, critic="a:b"), "--critic a:b comes as it is; give one of the two"),
        (dict(beta=-1.0), "beta is -1.0; give a positive number"),
        (dict(beta=0.0, env_id="Hoper-v5"), "beta is 0.0; give a positive number"),
    ]
    for settings, words in cases:
        with pytest.raises(InputError, match=words):
            run("rtb_iql", dataset, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="hopper-medium"):
        run("rtb_iql", "hoper-medium-v2", tmp_path / "out")
    run("best_of_n", dataset, tmp_path / "out")
    capsys.readouterr()
    with pytest.raises(InputError, match="another configuration.*candidates"):
        run("best_of_n", dataset, tmp_path / "out", candidates=5)
    assert "transitions" not in capsys.readouterr().out


def test_mistake_6_the_settings_that_ran_are_those_written_down(dataset, tiny, tmp_path):
    """Published: defaults of the code differ from the paper's, and no file says what was run."""
    run("rtb_iql", dataset, tmp_path / "run", beta=2.5, critic_steps=16)
    config = json.loads((tmp_path / "run" / "posterior" / "config.json").read_text())
    assert config["posterior"]["finetune"]["beta"] == 2.5
    critic = tmp_path / "run" / "critic"
    assert json.loads((critic / "config.json").read_text())["critic"]["steps"] == 16
    assert json.loads((critic / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 16
    last = (tmp_path / "run" / "posterior" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["rtb/beta"] == 2.5 and json.loads(last)["step"] == 12


def test_unknown_keys_of_the_tuning_file_are_errors(tmp_path):
    path = tmp_path / "tuning.toml"
    path.write_text("[default]\nbeta = 2.0\n[hopper]\nbeta = 3.0\n")
    assert read_tuning(path, "hopper").beta == 3.0 and read_tuning(path, "other").beta == 2.0
    path.write_text("[hopper]\nalpha = 3.0\n")
    with pytest.raises(InputError, match=r"table \[hopper\]: unknown alpha; known are beta"):
        read_tuning(path, "other")


def test_a_beta_of_the_tuning_file_is_positive_in_every_table(tmp_path):
    path = tmp_path / "tuning.toml"
    for beta in ("-1.0", "0", "inf", "nan", "'3'"):
        path.write_text(f"[default]\nbeta = 2.0\n[hopper]\nbeta = {beta}\n")
        found = rf"tuning.toml, table \[hopper\]: beta is {beta}; give a positive number"
        with pytest.raises(InputError, match=found):
            read_tuning(path, "other")


def test_a_policy_of_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no directory .*nope; give the --out of a finished run"):
        load_policy(tmp_path / "nope")
    with pytest.raises(InputError, match="no fitted stage"):
        load_policy(tmp_path)
