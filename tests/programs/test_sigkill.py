"""SIGKILL in each stage of the main job, for real; minutes, so not in the default suite."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rtb_rl.rl import collect

pytestmark = [pytest.mark.slow, pytest.mark.mujoco]
STAGES = ("prior", "critic", "iql", "posterior", "evaluation")


def command(out, dataset):
    options = ["--dataset", dataset, "--out", str(out), "--budget", "smoke"]
    return [str(Path(sys.executable).with_name("rtb-rl")), "run", "rtb_iql", *options]


def test_killed_in_each_stage_it_ends_with_the_same_results(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    dataset = collect("hopper-random", steps=5000, seed=0)
    subprocess.run(command(tmp_path / "whole", dataset), check=True, capture_output=True)
    killed = []
    for stage in STAGES:
        process = subprocess.Popen(
            command(tmp_path / "cut", dataset), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        while not (tmp_path / "cut" / stage / "config.json").exists():
            time.sleep(0.005)
            assert process.poll() is None
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed.append(stage)
    subprocess.run(command(tmp_path / "cut", dataset), check=True, capture_output=True)
    results = [
        json.loads((tmp_path / side / "results.json").read_text()) for side in ("whole", "cut")
    ]
    assert killed == list(STAGES)
    for key in ("methods", "diagnostics", "dataset", "versions"):
        assert results[0][key] == results[1][key], key
    for stage in ("prior", "critic", "iql", "posterior"):
        one, other = (tmp_path / side / stage / "model.safetensors" for side in ("whole", "cut"))
        assert one.read_bytes() == other.read_bytes()
