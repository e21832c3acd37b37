"""Exported policies against the Python policies they come from, and what export refuses."""

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rtb_rl import cli
from rtb_rl.core import Sampler, trajectory
from rtb_rl.errors import InputError
from rtb_rl.rl import evaluate, load_dataset, load_policy
from rtb_rl.rl.critics.training import (
    CriticSettings,
    GaussianSettings,
    fit_critic,
    fit_gaussian_policy,
)
from rtb_rl.rl.data.dataset import data_facts
from rtb_rl.rl.export import exporting, tracing
from rtb_rl.rl.export.exporting import export_policy, largest_difference, load_exported
from rtb_rl.rl.export.module import draw_noise, exported_policy
from rtb_rl.rl.jobs.run_critic import load_iql_critic
from rtb_rl.rl.jobs.saved import load_prior
from rtb_rl.rl.peers.energy_guidance import EnergyGuidedDenoiser
from rtb_rl.rl.posteriors.policy import DiffusionPolicy
from rtb_rl.rl.posteriors.posterior import PosteriorSettings, fit_posterior, posterior_model
from rtb_rl.rl.posteriors.prior import ActionDiffusion, ActionNetwork, fit_prior
from rtb_rl.training import FinetuneSettings, PretrainSettings, Run, generator_for
from rtb_rl.training.stage import fingerprint

LOW, HIGH = torch.tensor([-1.0, 0.0]), torch.tensor([3.0, 0.5])
SMALL = ActionNetwork(levels=2, width=8, blocks=1)


class Quadratic(nn.Module):
    """-(a - W s)^2, with its gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.4, -0.5]]))

    def q(self, observation, action):
        return -(action - observation @ self.weight.mT).square().sum(1)

    def action_gradient(self, observation, action):
        return -2 * (action - observation @ self.weight.mT)


@dataclass
class Holding:
    """No torch module itself."""

    inner: nn.Module

    def q(self, observation, action):
        return self.inner.q(observation, action)


class Branching(nn.Module):
    def q(self, observation, action):
        return action.sum(1) if bool((action > 0).all()) else -action.sum(1)


def disturb(module):
    generator = generator_for(0, "disturbed")
    for parameter in module.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.requires_grad_(False)


def policy_of(*, langevin=False, candidates=1, critic=None):
    """For three observations and two actions in [-1, 3] x [0, 0.5]."""
    prior = ActionDiffusion(3, 2, SMALL, generator=generator_for(0, "prior"))
    model = disturb(posterior_model(prior, critic, langevin=langevin))
    return DiffusionPolicy(
        model.sampler, action_low=LOW, action_high=HIGH, candidates=candidates, critic=critic
    )


def observations_of(rows, size=3):
    return torch.randn(rows, size, generator=generator_for(rows, "observations"))


def module_of(policy, critic=None):
    return exported_policy(policy, "rtb", critic, 3)


@pytest.mark.parametrize("candidates", [1, 4])
@pytest.mark.parametrize("langevin", [False, True])
def test_the_module_is_the_policy_with_its_draws_as_an_argument(candidates, langevin):
    critic = disturb(Quadratic())
    policy = policy_of(langevin=langevin, candidates=candidates, critic=critic)
    module, observations = module_of(policy, critic), observations_of(7)
    noise = draw_noise(3, 7 * candidates, 2, generator=generator_for(0, "noise"))
    actions = policy.act(observations, generator=generator_for(0, "noise"))
    assert torch.equal(module(observations, noise), actions)
    assert (actions >= LOW).all() and (actions <= HIGH).all()
    each = observations.repeat_interleave(candidates, 0)
    path = trajectory.rollout(
        policy.sampler.diffusion,
        policy.sampler.denoiser,
        each,
        7 * candidates,
        generator=generator_for(0, "noise"),
    )
    assert torch.equal(module.proposal(each, noise), path.x0)
    if candidates > 1:  # by hand: the candidate nearest to the critic's optimum
        clipped = path.x0.clamp(-1, 1).reshape(7, candidates, 2)
        distance = (clipped - (observations @ critic.weight.mT)[:, None]).square().sum(2)
        chosen = clipped[torch.arange(7), distance.argmin(1)]
        torch.testing.assert_close(actions, LOW + (chosen + 1) * (HIGH - LOW) / 2)


def test_a_candidate_that_the_critic_values_alike_is_no_difference():
    class Same(Quadratic):
        def q(self, observation, action):
            return 0 * action[:, 0] + 100

    class Takes:
        """Another of the candidates, or none of them."""

        def __init__(self, module, shift):
            self.module, self.shift = module, shift

        def act(self, observations, *, generator):
            noise = draw_noise(3, 4 * len(observations), 2, generator=generator)
            last = self.module.proposals(observations, noise)[3::4]
            return self.module.low + (last + 1) * self.module.half_width + self.shift

    for critic, shift, low, high in (
        (Same(), 0.0, 0, 1e-5),
        (Same(), 0.1, 0.04, 0.41),  # 0.1 is 0.4 half-widths of the second coordinate
        (Quadratic(), 0.0, 0.04, 2),
    ):
        policy = policy_of(candidates=4, critic=critic.requires_grad_(False))
        module = module_of(policy)
        found = largest_difference(policy, Takes(module, shift), module)
        assert low <= found <= high
        assert largest_difference(policy, policy, module) == 0
        assert math.isnan(largest_difference(policy, Takes(module, math.nan), module))


def test_a_critic_that_is_no_module_itself_is_traced():
    policy = policy_of(candidates=2, critic=Holding(Quadratic()))
    program = tracing.traced(module_of(policy)).module()
    noise = draw_noise(3, 10, 2, generator=generator_for(0, "noise"))
    actions = policy.act(observations_of(5), generator=generator_for(0, "noise"))
    torch.testing.assert_close(program(observations_of(5), noise), actions, rtol=0, atol=1e-6)


def test_what_cannot_be_exported_is_refused():
    class Other:
        def act(self, observations, *, generator):
            return observations

    with pytest.raises(InputError, match=r"method 'rtb' acts by Other.*another --method"):
        module_of(Other())
    with pytest.raises(InputError, match="gradient of Holding by autograd"):
        module_of(policy_of(langevin=True, critic=Quadratic()), Holding(Quadratic()))
    with pytest.raises(InputError, match="can't be traced .*without branches"):
        tracing.traced(module_of(policy_of(candidates=2, critic=Branching())))


def guided_policy(scale):
    prior = ActionDiffusion(3, 2, SMALL, generator=generator_for(0, "prior"))
    prior = disturb(prior)
    energy = EnergyGuidedDenoiser(
        prior.diffusion, prior.denoiser, lambda x, level, s: -x.square().sum(1), scale=scale
    )
    sampler = Sampler(prior.diffusion, energy)
    return DiffusionPolicy(sampler, action_low=LOW, action_high=HIGH)


def test_a_policy_that_a_learned_energy_guides_is_refused_by_that_name():
    """A critic of one's own was blamed, which there was none."""
    with pytest.raises(InputError, match="'qgpo' is guided by the gradient .*--method.* prior"):
        exported_policy(guided_policy(1.0), "qgpo", None, 3)
    tracing.traced(exported_policy(guided_policy(0.0), "qgpo", None, 3))  # it is the prior


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of rtb_iql as the program leaves it, on Pendulum, with weights that were disturbed."""
    root = tmp_path_factory.mktemp("run") / "run"
    random = np.random.default_rng(0)
    arrays = dict(
        observations=random.normal(size=(120, 3)) * [1, 1, 4] + [0, 0, 2],
        actions=random.uniform(-2, 2, (120, 1)),
        rewards=random.normal(size=120),
        terminals=np.zeros(120, bool),
        timeouts=np.arange(120) % 40 == 39,
    )
    arrays = {k: v if v.dtype == bool else v.astype(np.float32) for k, v in arrays.items()}
    data = load_dataset(arrays, env_id="Pendulum-v1", action_box=(-2.0, 2.0))
    own = dict(program="rtb_iql", method="rtb", seed=3, candidates=3, critic=None)
    run = Run(root, {**data_facts(data), **own})
    few = dict(steps=2, batch=16)
    prior = fit_prior(root / "prior", data, PretrainSettings(**few), SMALL)
    critic = fit_critic(root / "critic", data, CriticSettings(**few))
    fit_gaussian_policy(root / "iql", data, critic, GaussianSettings(**few))
    finetune = FinetuneSettings(updates=1, conditions=4, beta=2.5)
    settings = PosteriorSettings(finetune, langevin=True, diagnostic_rows=2)
    fit_posterior(root / "posterior", data, prior, critic, settings)
    run.finish({"methods": {}})
    for stage in ("prior", "critic", "iql", "posterior"):
        path = root / stage / "model.safetensors"
        weights = load_file(path)
        generator = generator_for(0, stage)
        for name in [name for name in weights if name.split(".")[-1] in LEARNED or "s." in name]:
            weights[name] += 0.1 * torch.randn(weights[name].shape, generator=generator)
        save_file(weights, path)
        stage_results = json.loads((root / stage / "results.json").read_text())
        stage_results["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (root / stage / "results.json").write_text(json.dumps(stage_results))
    made_of = json.loads((root / "posterior" / "config.json").read_text())
    made_of["prior"] = fingerprint(load_prior(root / "prior"))
    made_of["critic"] = fingerprint(load_iql_critic(root / "critic"))
    (root / "posterior" / "config.json").write_text(json.dumps(made_of))
    return root


LEARNED = ("weight", "bias", "scale", "log_scale")


@pytest.mark.parametrize(
    ("method", "format", "candidates"),
    [
        ("iql", "torch", None),
        ("iql", "onnx", None),
        ("prior", "torch", None),
        ("best_of_n", "onnx", 5),
    ],
)
def test_a_file_acts_like_the_run_it_comes_from(finished, tmp_path, method, format, candidates):
    path = tmp_path / "policy.bin"
    done = export_policy(finished, path, method=method, format=format, candidates=candidates)
    assert done.difference <= 1e-5 and done.path == path and list(tmp_path.iterdir()) == [path]
    loaded, policy = load_exported(path), done.policies["Python"]
    for rows in (1, 2, 33):
        given = observations_of(rows)
        actions = [p.act(given, generator=generator_for(rows, "act")) for p in (policy, loaded)]
        torch.testing.assert_close(*actions, rtol=0, atol=2e-5)
        assert rows == 1 or actions[0].std() > 1e-3
    if candidates is None:
        saved = load_policy(finished, method).act(given, generator=generator_for(33, "act"))
        assert torch.equal(saved, actions[0])
    facts, config = loaded.facts, json.loads((finished / "config.json").read_text())
    same = ("env_id", "data_sha256", "seed", "action_low", "action_high", "reference_returns")
    assert {key: facts[key] for key in same} == {key: config[key] for key in same}
    assert facts["method"] == method and facts["candidates"] == (candidates or 1)
    assert facts["levels"] == (None if method == "iql" else 2)
    assert facts["versions"]["torch"] == torch.__version__
    with pytest.raises(InputError, match=r"shape \[2, 4\].* \[batch, 3\]"):
        loaded.act(torch.zeros(2, 4), generator=generator_for(0, "act"))


@pytest.fixture(scope="module")
def files(finished, tmp_path_factory):
    """rtb with its Langevin term in both formats."""
    folder = tmp_path_factory.mktemp("files")
    return {f: export_policy(finished, folder / f, format=f).path for f in ("torch", "onnx")}


def test_episodes_of_a_file_are_those_of_the_run(finished, files):
    expected = evaluate(load_policy(finished), "Pendulum-v1", episodes=2, seed=5)
    program = evaluate(load_exported(files["torch"]), "Pendulum-v1", episodes=2, seed=5)
    assert program.returns == expected.returns
    session = evaluate(load_exported(files["onnx"]), "Pendulum-v1", episodes=2, seed=5)
    assert session.returns == pytest.approx(expected.returns, rel=1e-2)
    prior = evaluate(load_policy(finished, "prior"), "Pendulum-v1", episodes=2, seed=5)
    assert prior.returns != pytest.approx(expected.returns, rel=1e-2)


WITHOUT_THE_PACKAGE = """
import json, sys
import numpy as np, torch, onnxruntime
sys.modules["rtb_rl"] = None
observations, noise = (torch.tensor(part) for part in json.load(sys.stdin))
program = torch.export.load(sys.argv[1]).module()
session = onnxruntime.InferenceSession(sys.argv[2], providers=["CPUExecutionProvider"])
given = {"observations": observations.numpy(), "noise": noise.numpy()}
found = [program(observations, noise).tolist(), session.run(["actions"], given)[0].tolist()]
facts = json.loads(session.get_modelmeta().custom_metadata_map["rtb_rl"])
print(json.dumps([*found, facts]))
"""


def test_files_need_no_package_and_tell_nothing_of_the_machine(finished, files):
    observations = observations_of(4)
    noise = draw_noise(3, 4, 1, generator=generator_for(0, "noise"))
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, files["torch"], files["onnx"]]
    given = json.dumps([observations.tolist(), noise.tolist()])
    result = subprocess.run(command, input=given, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    *actions, facts = json.loads(result.stdout.splitlines()[-1])
    expected = load_policy(finished).act(observations, generator=generator_for(0, "noise"))
    for found in actions:
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=2e-5)
    assert facts["method"] == "rtb" and facts["beta"] == 2.5 and facts["levels"] == 2
    assert facts["inputs"] == {"observations": ["batch", 3], "noise": [3, "batch", 1]}
    package = exporting.__file__.removesuffix("rl/export/exporting.py")
    assert package != exporting.__file__
    for path in files.values():
        assert package.encode() not in path.read_bytes()


def test_a_file_that_does_not_agree_is_not_kept(finished, tmp_path, monkeypatch):
    path = tmp_path / "policy.pt2"
    path.write_text("an earlier one")
    act = exporting.LoadedPolicy.act
    monkeypatch.setattr(
        exporting.LoadedPolicy, "act", lambda *a, **k: act(*a, **k) + 1e-4, raising=True
    )
    with pytest.raises(InputError, match=r"differ from those of the Python policy by [45]"):
        export_policy(finished, path, method="iql", format="torch")
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "an earlier one"


def test_bad_input_is_one_sentence(finished, tmp_path):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text((finished / "config.json").read_text())
    (tmp_path / "file").write_text("PK or not")
    cases = [
        ((tmp_path / "nothing",), {}, "nothing is no run"),
        ((finished / "prior",), {}, "prior is no run of an offline-RL program"),
        ((unfinished,), {}, "unfinished is not finished"),
        ((finished,), dict(method="sac"), "method 'sac' is none of prior"),
        ((finished,), dict(method="td3_bc"), "td3_bc holds no fitted stage"),
        ((finished,), dict(format="tflite"), "neither onnx nor torch"),
        ((finished, tmp_path), {}, "can't write .*it is a directory"),
        ((finished, tmp_path / "file" / "x"), {}, "can't write .*Not a directory"),
        ((finished, tmp_path / "no" / "x"), {}, "can't write .*No such file"),
        ((finished, tmp_path / "x.pt2"), {}, "suffix of --format torch, but the format is onnx"),
        ((finished,), dict(method="iql", candidates=2), "one action, but --candidates is 2"),
        ((finished,), dict(method="prior", candidates=0), "candidates is 0"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(InputError, match=message):
            export_policy(*arguments, **options)
    for path, message in (("missing", "can't read"), ("file", "holds no policy")):
        with pytest.raises(InputError, match=message):
            load_exported(tmp_path / path)
    torch.save({}, tmp_path / "other.pt2")
    with pytest.raises(InputError, match="holds no policy"):
        load_exported(tmp_path / "other.pt2")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(missing, finished, files, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=rf"need {missing}.*rtb-rl\[export\]"):
        export_policy(finished)
    if missing == "onnxruntime":
        with pytest.raises(InputError, match=r"need onnxruntime.*rtb-rl\[export\]"):
            load_exported(files["onnx"])
    load_exported(files["torch"])


def test_the_command_writes_checks_and_times(finished, tmp_path, capsys):
    assert cli.main(["export", str(finished), "--method", "iql", "--format", "torch"]) == 0
    out = finished / "iql.pt2"
    printed = capsys.readouterr().out
    assert str(out) in printed and "iql for Pendulum-v1" in printed
    for row in ("batch 64, ms", "Python", "torch.export program"):
        assert row in printed
    assert load_exported(out).facts["method"] == "iql"
    assert cli.main(["export", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("rtb-rl: error: ")
