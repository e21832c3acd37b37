"""d3rlpy in an interpreter of its own: what it gets, what comes back, what goes wrong.

Here a script stands in for that interpreter: it keeps the arrays it was given and hands back a
policy made in the test. RTB_RL_D3RLPY_PYTHON names a real one for the last test.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rtb_rl.agents import d3rlpy_peer as program
from torch import nn

from rtb_rl.errors import CheckpointError, InputError
from rtb_rl.rl import evaluate, load_dataset, load_policy
from rtb_rl.rl.peers import d3rlpy_worker
from rtb_rl.rl.peers.d3rlpy_peer import arrays_for_d3rlpy
from rtb_rl.rl.peers.scripted_policy import load_scripted_policy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.tensor results:torch.jit.TracerWarning"),
]
REAL = os.environ.get("RTB_RL_D3RLPY_PYTHON")
VERSIONS = {"d3rlpy": "2.8.1", "torch": "2.13.0", "gymnasium": "1.0.0", "numpy": "2", "python": "3"}
FAKE = """
import json, shutil, sys
from pathlib import Path

here, words = Path(__file__).parent, sys.argv[1:]
assert words[0] == "-I"
if words[-1] == "versions":
    print((here / "versions.json").read_text())
    sys.exit()
option = dict(zip(words[words.index("train") + 1 :: 2], words[words.index("train") + 2 :: 2]))
out, steps = Path(option["--out"]), int(option["--steps"])
with open(here / "starts", "a") as file:
    file.write(json.dumps(option) + chr(10))
shutil.copy(option["--arrays"], here / "kept.npz")
print("a line of d3rlpy's own", file=sys.stderr)
for step in range(1, steps + 1):
    if step == 2 and (here / "fails").exists():
        sys.exit("MemoryError: the buffer did not fit")
    exported = f"policy_{step}.pt" if step * int(option["--exports"]) % steps == 0 else None
    if int(option["--exports"]) and exported:
        shutil.copy(here / "policy.pt", out / exported)
    report = {"step": step, "steps": steps, "metrics": {"loss": 1 / step}}
    print(json.dumps({**report, "policy": exported if int(option["--exports"]) else None}))
shutil.copy(here / "policy.pt", out / "policy.pt")
(out / "worker.json").write_text(json.dumps({"versions": {"d3rlpy": "2.8.1"}, "seconds": 0.5}))
"""


class Torque(nn.Module):
    """An action of Pendulum in [-1, 1] units; beyond them in many states."""

    def forward(self, observations):
        return observations @ torch.tensor([[0.3], [-1.5], [-0.7]])


class Direct:
    """The same policy in the environment's units, [-2, 2], without any file."""

    def act(self, observations, *, generator):
        return 2 * Torque()(observations).clamp(-1, 1)


@pytest.fixture
def fake(tmp_path):
    """A folder with the interpreter `python`, and all that it reads and leaves."""
    folder = tmp_path / "interpreter"
    folder.mkdir()
    (folder / "fake.py").write_text(FAKE)
    script(folder / "python", f"exec '{sys.executable}' '{folder / 'fake.py'}' \"$@\"")
    (folder / "versions.json").write_text(json.dumps(VERSIONS))
    export(Torque(), folder / "policy.pt")
    return folder


def export(module, path):
    traced: Any = torch.jit.trace(module, torch.zeros(1, 3))
    traced.save(str(path))


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def recorded(tmp_path):
    """Five episodes of Pendulum: 0 ends by itself, 1 is cut, 2 too, 3 ends, 4 is left open."""
    draw = np.random.default_rng(0)
    rows, ends = 40, {7: "terminals", 15: "timeouts", 23: "timeouts", 31: "terminals"}
    arrays = {
        "observations": draw.normal(size=(rows, 3)).astype(np.float32),
        "actions": draw.uniform(-2, 2, (rows, 1)).astype(np.float32),
        "rewards": draw.normal(size=rows).astype(np.float32),
        "terminals": np.array([ends.get(i) == "terminals" for i in range(rows)]),
        "timeouts": np.array([ends.get(i) == "timeouts" for i in range(rows)]),
    }
    np.savez(tmp_path / "pendulum.npz", **arrays)
    return tmp_path / "pendulum.npz"


def settings(recorded, out, python, **others):
    given = dict(steps=4, budget="smoke", seed=3, env_id="Pendulum-v1") | others
    return program.Settings(dataset=str(recorded), out=out, python=python, **given)


def run(recorded, out, python, **others):
    program.main(settings(recorded, out, python, **others))
    return json.loads((out / "results.json").read_text())


def starts(fake):
    return len((fake / "starts").read_text().splitlines())


def test_d3rlpy_gets_the_transitions_of_the_data_set(recorded, fake, tmp_path):
    run(recorded, tmp_path / "run", fake / "python", algorithm="cql", batch=17)
    with np.load(recorded) as file, np.load(fake / "kept.npz") as kept:
        given, got = dict(file), dict(kept)
    rows = np.array([i for i in range(40) if i not in (15, 23, 39)])  # successor not recorded
    returns = [given["rewards"][first : first + 8].sum() for first in (0, 8, 16, 24)]
    scale = 1000 / (max(returns) - min(returns))
    assert np.array_equal(got["observations"], given["observations"][rows])
    np.testing.assert_allclose(got["actions"], given["actions"][rows] / 2, atol=1e-6)
    np.testing.assert_allclose(got["rewards"], given["rewards"][rows] * scale, rtol=1e-4)
    assert np.array_equal(got["terminals"], given["terminals"][rows])
    going_on = ~given["terminals"][rows]
    successors = given["observations"][np.minimum(rows + 1, 39)]
    assert np.array_equal(got["next_observations"][going_on], successors[going_on])
    assert list(rows[got["timeouts"]]) == [14, 22, 38]
    option = json.loads((fake / "starts").read_text())
    assert (option["--algorithm"], option["--batch"], option["--seed"]) == ("cql", "17", "3")


def test_the_worker_makes_episodes_of_the_same_transitions(recorded):
    dataset = load_dataset(recorded, env_id="Pendulum-v1")
    dataset = replace(dataset, truncated=torch.arange(len(dataset)) % 5 == 0)
    arrays = arrays_for_d3rlpy(dataset)
    seen = {name: [] for name in ("observations", "actions", "rewards", "next", "terminals")}
    for episode in d3rlpy_worker.episodes_of(arrays):
        size = len(episode["actions"]) - (not episode["terminated"])
        assert size and len(episode["observations"]) == len(episode["rewards"])
        for i in range(size):  # as d3rlpy's transition picker reads an episode
            last = episode["terminated"] and i == size - 1
            seen["terminals"].append(last)
            seen["next"].append(np.zeros(3) if last else episode["observations"][i + 1])
            for name in ("observations", "actions", "rewards"):
                seen[name].append(episode[name][i])
    assert np.array_equal(seen["observations"], dataset.observations)
    assert np.array_equal(seen["actions"], dataset.actions)
    assert np.array_equal(np.ravel(seen["rewards"]), dataset.rewards)
    assert np.array_equal(seen["terminals"], dataset.terminated)
    going_on = ~dataset.terminated.numpy()
    assert np.array_equal(np.array(seen["next"])[going_on], dataset.next_observations[going_on])


@pytest.mark.parametrize("algorithm", ["iql", "cql"])
def test_its_policy_is_evaluated_by_our_evaluation(recorded, fake, tmp_path, algorithm):
    out = tmp_path / "run"
    results = run(recorded, out, fake / "python", algorithm=algorithm, curve=2)
    method = f"d3rlpy_{algorithm}"
    direct = evaluate(Direct(), "Pendulum-v1", episodes=2, seed=3)
    assert results["methods"][method]["returns"] == pytest.approx(direct.returns, rel=1e-6)
    policy = load_policy(out)
    observations = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator()
    expected = Direct().act(observations, generator=generator)
    torch.testing.assert_close(policy.act(observations, generator=generator), expected)
    assert {1.0, -1.0} < set((expected / 2).ravel().tolist())  # the box is reached on both sides
    assert [point["step"] for point in results["curve"]] == [2, 4]
    assert results["timings"] == {"d3rlpy": 0.5}
    versions = {name: results["versions"][f"d3rlpy's {name}"] for name in ("torch", "gymnasium")}
    assert versions == {name: VERSIONS[name] for name in versions}
    assert results["versions"]["d3rlpy"] == "2.8.1" and "starts again" in json.dumps(results)
    assert not list(out.rglob("*.npz")) and len(list(out.rglob("*.pt"))) == 1


def test_a_complete_training_is_not_repeated_and_a_changed_one_refused(recorded, fake, tmp_path):
    first = run(recorded, tmp_path / "run", fake / "python")
    assert run(recorded, tmp_path / "run", fake / "python")["methods"] == first["methods"]
    assert starts(fake) == 1
    (fake / "versions.json").write_text(json.dumps(VERSIONS | {"d3rlpy": "2.9.0"}))
    with pytest.raises(InputError, match=r"another configuration.*2\.9\.0"):
        run(recorded, tmp_path / "run", fake / "python")


def test_training_that_was_stopped_starts_again(recorded, fake, tmp_path, monkeypatch):
    whole = run(recorded, tmp_path / "whole", fake / "python", curve=2)

    def stop(curve, done, steps, policy):
        curve.path.write_text(json.dumps([{"step": 1, "steps": 4, "returns": [0.0]}]))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("rtb_rl.rl.episodes.curve.Curve.__call__", stop)
        run(recorded, tmp_path / "cut", fake / "python", curve=2)
    assert (tmp_path / "cut" / "d3rlpy" / "metrics.jsonl").exists()
    with pytest.raises(InputError, match="d3rlpy is not finished .*run the same command again"):
        load_policy(tmp_path / "cut")
    again = run(recorded, tmp_path / "cut", fake / "python", curve=2)
    assert again["methods"] == whole["methods"] and again["curve"] == whole["curve"]
    metrics = [tmp_path / side / "d3rlpy" / "metrics.jsonl" for side in ("whole", "cut")]
    assert metrics[0].read_text() == metrics[1].read_text() and starts(fake) == 3


def test_a_failing_worker_is_one_error_with_its_last_line_and_the_log(recorded, fake, tmp_path):
    (fake / "fails").touch()
    with pytest.raises(InputError, match="status 1: MemoryError: the buffer did not fit") as error:
        run(recorded, tmp_path / "run", fake / "python")
    log = tmp_path / "run" / "d3rlpy" / "d3rlpy.log"
    assert str(log) in str(error.value) and "a line of d3rlpy's own" in log.read_text()
    (fake / "fails").unlink()
    assert run(recorded, tmp_path / "run", fake / "python")["methods"]["d3rlpy_iql"]["returns"]


def test_an_interpreter_without_d3rlpy_is_refused_before_anything_is_written(
    recorded, fake, tmp_path
):
    lines = "echo Traceback >&2; echo \"No module named 'd3rlpy'\" >&2; exit 1"
    (fake / "versions.json").write_text(json.dumps(VERSIONS | {"d3rlpy": "1.1.1"}))
    cases = [
        (None, "no interpreter"),
        (tmp_path / "nowhere" / "python", "can't be started.*No such file"),
        (script(tmp_path / "empty", lines), "can't import d3rlpy.*No module named 'd3rlpy'"),
        (script(tmp_path / "echo", 'echo "$@"'), "does not answer as Python"),
        (fake / "python", r"has d3rlpy 1\.1\.1, needed 2"),
    ]
    for python, words in cases:
        with pytest.raises(InputError, match=words) as error:
            run(recorded, tmp_path / "run", python)
        assert python is None or str(python) in str(error.value)
        assert "python -m venv peers" in str(error.value)
        assert "pip install d3rlpy==2.8.1 torch==" in str(error.value)
    with pytest.raises(InputError, match="steps=0"):
        run(recorded, tmp_path / "run", fake / "python", steps=0)
    assert not (tmp_path / "run").exists() and not (fake / "starts").exists()


def test_a_damaged_or_foreign_policy_file_is_refused(recorded, fake, tmp_path):
    run(recorded, tmp_path / "run", fake / "python")
    path = tmp_path / "run" / "d3rlpy" / "policy.pt"
    export(nn.Tanh(), path)
    with pytest.raises(CheckpointError, match="sha256"):
        load_policy(tmp_path / "run")
    path.write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="can't be loaded by torch"):
        box = torch.ones(1)
        load_scripted_policy(path, action_low=-box, action_high=box)


@pytest.mark.skipif(REAL is None, reason="RTB_RL_D3RLPY_PYTHON names no interpreter with d3rlpy")
@pytest.mark.parametrize("algorithm", ["iql", "cql"])
def test_the_real_d3rlpy(recorded, tmp_path, algorithm):
    """Its training does not depend on how often it is watched, and counts our transitions."""
    python = Path(str(REAL))
    one, other = (
        run(recorded, tmp_path / f"curve{curve}", python, algorithm=algorithm, curve=curve)
        for curve in (0, 2)
    )
    assert one["methods"] == other["methods"] and len(other["curve"]) == 2
    stage = json.loads((tmp_path / "curve0" / "d3rlpy" / "results.json").read_text())
    assert stage["transitions"] == 37 and stage["config"]["batch_size"] == 256
    observations = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    actions = load_policy(tmp_path / "curve0").act(observations, generator=torch.Generator())
    assert actions.shape == (9, 1) and (actions.abs() <= 2).all() and actions.std() > 0
