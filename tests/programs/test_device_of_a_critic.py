"""A critic of one's own is where training is: moved there where it is a module, or refused first.

There may be no GPU here, so the device of training is called "meta", whose tensors hold nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rtb_rl.agents import best_of_n

from rtb_rl.errors import InputError
from rtb_rl.rl import open_job
from rtb_rl.rl.jobs import job, opening

CRITICS = """
import torch

class Weighted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def q(self, observation, action):
        assert observation.device == action.device
        if action.device != self.weight.device:
            raise RuntimeError(f"weights on {self.weight.device}")
        return torch.zeros(len(action))

class Holding:
    def __init__(self, device):
        self.inner = Weighted().to(device)

    def q(self, observation, action):
        return self.inner.q(observation, action)

def module(): return Weighted()
def on_cpu(): return Holding("cpu")
def elsewhere(): return Holding("meta")
"""


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens a job with a critic of these, with training on another device than the CPU."""
    ends = np.arange(80) % 40 == 39
    arrays: Any = dict(observations=np.ones((80, 3), np.float32) * np.arange(80)[:, None])
    arrays |= dict(actions=np.zeros((80, 1), np.float32), rewards=np.arange(80.0))
    np.savez(tmp_path / "mine.npz", **arrays, terminals=ends & False, timeouts=ends)
    (tmp_path / "weighted_critic.py").write_text(CRITICS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for module in (job, opening):
        monkeypatch.setattr(module, "device_for_training", lambda: torch.device("meta"))

    def open_with(name):
        tuning = Path(best_of_n.__file__).with_name("rtb_iql.toml")
        given: Any = dict(dataset="mine.npz", env_id="Pendulum-v1", out=tmp_path / "run")
        settings = best_of_n.Settings(critic=f"weighted_critic:{name}", **given)
        return open_job(settings, program="best_of_n", method="best_of_n", tuning_file=tuning)

    return open_with


def test_a_module_is_moved_where_training_is(opened):
    """It stayed on the CPU: the posterior refused it, after the prior had been trained."""
    assert opened("module").critic().weight.device.type == "meta"


@pytest.mark.parametrize(
    ("name", "device", "weights"), [("on_cpu", "meta", "cpu"), ("elsewhere", "cpu", "meta")]
)
def test_any_other_has_to_follow_its_inputs(opened, tmp_path, name, device, weights):
    """In training, and on the CPU where it acts."""
    words = f"on {device}. raised RuntimeError: weights on {weights}; .*a torch module is moved"
    with pytest.raises(InputError, match=words):
        opened(name)
    assert not (tmp_path / "run").exists()
