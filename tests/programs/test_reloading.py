"""Runs of a critic of one's own are opened again from what their directory says."""

import json

import numpy as np
import pytest
from rtb_rl.agents import best_of_n
from rtb_rl.benchmarks import extraction
from tiny_budget import TINY

from rtb_rl.rl import load_policy
from rtb_rl.rl.jobs import opening

pytestmark = pytest.mark.mujoco
CRITIC = """
class Reach:
    def q(self, observation, action): return action.sum(1)
def make(dataset):
    assert dataset.env_id == "Hopper-v5"
    return Reach()
"""


def test_data_that_needed_an_environment_and_clipping(tmp_path, monkeypatch):
    """The file says nothing of its environment, and some actions lie outside the box."""
    random = np.random.default_rng(0)
    ends = np.arange(200) % 20 == 19
    arrays = dict(
        observations=random.normal(size=(200, 11)).astype(np.float32),
        actions=random.uniform(-1.2, 1.2, (200, 3)).astype(np.float32),
        rewards=random.normal(size=200).astype(np.float32),
    )
    np.savez(tmp_path / "mine.npz", **arrays, terminals=ends, timeouts=np.zeros(200, bool))
    (tmp_path / "reach_critic.py").write_text(CRITIC)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(opening, "budget_for", lambda name, tuning: TINY.with_beta(tuning.beta))
    out = tmp_path / "run"
    given = dict(dataset="mine.npz", env_id="Hopper-v5", clip_actions=True)
    best_of_n.main(best_of_n.Settings(out=out, critic="reach_critic:make", **given))
    assert load_policy(out).env_id == "Hopper-v5"
    extraction.main(extraction.Settings(runs=(out,), out=tmp_path / "table", fast=True))
    rows = [json.loads(line) for line in (tmp_path / "table" / "rows.jsonl").open()]
    assert [row["method"] for row in rows] == ["prior", "best_of_n"]
