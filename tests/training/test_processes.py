"""Several processes train what one process would have trained on the same batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from two_processes import TASKS

from rtb_rl.training import Run, train


@pytest.mark.parametrize(("task", "rounding"), [("toy", 1e-7), ("text-to-image", 1e-5)])
def test_two_processes_match_one_on_the_same_batch(task, rounding, tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = str(script.parents[1])  # where the tiny pipelines are
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": tests}
    environment |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), task, str(tmp_path)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    expected = TASKS[task](Accelerator(cpu=True))
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=rounding)


class Counter:
    def __init__(self):
        self.value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_processes_go_on_from_the_last_step_that_all_of_them_reached(tmp_path):
    def count(steps, agree=lambda step: step):
        counter, seen = Counter(), []

        def update(step):
            seen.append(step)
            counter.value += 1
            return {"count": float(counter.value)}

        run = Run(tmp_path, {})
        train(run, update, {"c": counter}, steps=steps, description="count", checkpoint_every=2,
              agree=agree)  # fmt: skip
        return counter.value, seen

    assert count(4)[0] == 4
    assert count(6, agree=lambda step: 2) == (6, [2, 3, 4, 5])
    assert count(8, agree=lambda step: 0) == (8, list(range(8)))
