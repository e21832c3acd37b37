"""Stages shared by runs: fitted once, whoever asks, and whoever dies."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from filelock import FileLock, Timeout

from rtb_rl.errors import InputError
from rtb_rl.rl import load_dataset
from rtb_rl.rl.jobs import shared_stages
from rtb_rl.rl.jobs.shared_stages import SharedStages, copy_stage

ROWS = 20
FACTS = {"seed": 0, "steps": 3}
FITTER = """
import sys, time
from pathlib import Path
import torch
from rtb_rl.rl import load_dataset
from rtb_rl.rl.jobs.shared_stages import SharedStages

root, own, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
ends = torch.ones(20, dtype=torch.bool).numpy()
zeros = torch.zeros(20, 2).numpy()
data = load_dataset(dict(observations=zeros, actions=zeros, rewards=zeros[:, 0], terminals=ends,
                         timeouts=~ends))

def fit(directory):
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "results.json").exists():
        with open(directory / "begun", "a") as file:
            file.write("x")
        time.sleep(seconds)
        (directory / "results.json").write_text("{}")

SharedStages(root, data).stage(own, {"seed": 0, "steps": 3}, fit)
"""


@pytest.fixture
def data():
    ends = torch.ones(ROWS, dtype=torch.bool).numpy()
    zeros = torch.zeros(ROWS, 2).numpy()
    arrays = dict(observations=zeros, actions=zeros, rewards=zeros[:, 0])
    return load_dataset(dict(**arrays, terminals=ends, timeouts=~ends))


def fit(directory):
    """A stage that counts how often it was fitted."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "checkpoints").mkdir(exist_ok=True)
    if not (directory / "results.json").exists():
        with open(directory / "begun", "a") as file:
            file.write("x")
        (directory / "results.json").write_text("{}")
    return directory


def fitter(tmp_path, name, seconds):
    arguments = [str(tmp_path / "stages"), str(tmp_path / name / "prior"), str(seconds)]
    (tmp_path / name).mkdir()
    return subprocess.Popen([sys.executable, "-c", FITTER, *arguments])


def test_an_option_that_is_left_out_makes_no_other_stage(data, tmp_path):
    """One that came with a later version, at the top or in a table of settings."""
    stages = SharedStages(tmp_path / "stages", data)
    of = {"seed": 0, "prior": {"steps": 3}}
    stages.stage(tmp_path / "old" / "prior", of, fit)
    later = {"seed": 0, "prior": {"steps": 3, "level_power": None}, "acting_beta": None}
    stages.stage(tmp_path / "new" / "prior", later, fit)
    other = {"seed": 0, "prior": {"steps": 3, "level_power": 1.0}}
    stages.stage(tmp_path / "other" / "prior", other, fit)
    assert len(list((tmp_path / "stages").rglob("begun"))) == 2


def test_a_stage_is_fitted_once_and_copied_without_its_checkpoints(data, tmp_path):
    stages = SharedStages(tmp_path / "stages", data)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert stages.stage(tmp_path / name / "prior", FACTS, fit) == tmp_path / name / "prior"
        assert (tmp_path / name / "prior" / "begun").read_text() == "x"
    shared = [path for path in (tmp_path / "stages").rglob("begun")]
    assert [path.read_text() for path in shared] == ["x"]
    assert shared[0].parent.name.startswith("prior-seed0-")
    stages.stage(tmp_path / "one" / "critic", FACTS, fit)
    stages.stage(tmp_path / "two" / "critic", {**FACTS, "steps": 4}, fit)
    assert len(list((tmp_path / "stages").rglob("begun"))) == 3


def test_without_a_directory_and_where_a_run_has_begun_the_stage_is_its_own(data, tmp_path):
    SharedStages(None, data).stage(tmp_path / "prior", FACTS, fit)
    SharedStages(tmp_path / "stages", data).stage(tmp_path / "prior", FACTS, fit)
    assert (tmp_path / "prior" / "begun").read_text() == "x"
    assert not (tmp_path / "stages").exists()


def test_two_processes_fit_one_stage_and_a_killed_one_leaves_no_lock(tmp_path):
    killed = fitter(tmp_path, "killed", 60)
    while not list((tmp_path / "stages").rglob("begun")):
        time.sleep(0.05)
    waiting = [fitter(tmp_path, name, 0.2) for name in ("second", "third")]
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert [process.wait(timeout=60) for process in waiting] == [0, 0]
    (begun,) = (tmp_path / "stages").rglob("begun")
    assert begun.read_text() == "xx"  # the killed one, and one of the two that waited
    for name in ("second", "third"):
        assert (tmp_path / name / "prior" / "results.json").exists()


def test_a_directory_that_can_t_be_written_is_named(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't write shared stages in .*file.*another --stages"):
        SharedStages(tmp_path / "file", data).stage(tmp_path / "prior", FACTS, fit)


def test_one_file_read_for_two_environments_has_two_stages(data, tmp_path):
    other = replace(data, env_id="Hopper-v5"), replace(data, action_low=data.action_low * 2)
    for number, given in enumerate((data, *other)):
        own = tmp_path / f"{number}" / "prior"
        own.parent.mkdir()
        SharedStages(tmp_path / "stages", given).stage(own, FACTS, fit)
    assert len(list((tmp_path / "stages").rglob("begun"))) == 3


def test_a_stage_is_copied_under_the_lock_and_without_files_half_written(data, tmp_path):
    """Who opens the shared stage meanwhile writes its config.json anew."""
    held = []

    def copy(stage, own):
        (path,) = stage.parent.glob("*.lock")
        with pytest.raises(Timeout):
            FileLock(path).acquire(timeout=0)
        (stage / ".config.json.1.partial").write_text("")
        held.append(copy_stage(stage, own))

    (tmp_path / "a").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_stages, "copy_stage", copy)
        SharedStages(tmp_path / "stages", data).stage(tmp_path / "a" / "prior", FACTS, fit)
    assert held and not list((tmp_path / "a" / "prior").glob(".*"))


def test_what_fails_in_the_fit_is_told_as_it_is(data, tmp_path):
    def broken(directory):
        raise FileNotFoundError("my_reward_model.pt")

    with pytest.raises(FileNotFoundError, match="my_reward_model"):
        SharedStages(tmp_path / "stages", data).stage(tmp_path / "prior", FACTS, broken)
