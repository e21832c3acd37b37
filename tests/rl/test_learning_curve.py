"""A learning curve: when a policy is looked at, what is kept, and which point is the best."""

import importlib

import numpy as np
import pytest
import torch

from rtb_rl.rl import Curve, load_dataset

pytestmark = pytest.mark.mujoco


class Constant:
    """Always the same action; how often it was asked."""

    def __init__(self, value):
        self.value, self.asked = value, 0

    def act(self, observations, *, generator):
        self.asked += 1
        return torch.full((len(observations), 3), self.value)


def test_points_come_after_equal_shares_of_the_steps_and_the_best_is_that_of_the_highest_mean(
    tmp_path,
):
    curve = Curve(tmp_path / "stage" / "curve.json", "Hopper-v5", points=3, seed=0, episodes=2)
    (tmp_path / "stage").mkdir()
    for done in range(1, 201):
        curve(done, 200, Constant(0.1 if done < 100 else -1.0))
    assert [point["step"] for point in curve.points] == [67, 134, 200]
    assert {point["steps"] for point in curve.points} == {200}
    means = [sum(point["returns"]) / 2 for point in curve.points]
    assert curve.best["step"] == curve.points[means.index(max(means))]["step"]
    assert means[1] == means[2] != means[0]


def test_points_made_before_a_kill_are_not_made_again(tmp_path):
    for _ in range(2):
        policy = Constant(0.0)
        Curve(tmp_path / "curve.json", "Hopper-v5", points=2, seed=0, episodes=1)(50, 100, policy)
    assert policy.asked == 0


def test_every_point_asked_for_is_made(tmp_path):
    """Whatever the steps: that metrics are logged every 100 makes no difference."""
    module = importlib.import_module("rtb_rl.rl.peers.td3_bc")
    ends = np.arange(40) % 10 == 9
    rows = np.random.default_rng(0).uniform(-1, 1, (40, 14)).astype(np.float32)
    arrays = dict(observations=rows[:, :11], actions=rows[:, 11:], rewards=rows[:, 0])
    data = load_dataset(dict(**arrays, terminals=ends, timeouts=~ends & False))
    curve = Curve(tmp_path / "td3" / "curve.json", "Hopper-v5", points=5, seed=0, episodes=1)
    settings = module.TD3BCSettings(steps=25, batch=4)
    module.fit_td3_bc(tmp_path / "td3", data, settings, watch=curve)
    assert [point["step"] for point in curve.points] == [5, 10, 15, 20, 25]


def test_without_points_nothing_is_evaluated(tmp_path):
    policy, curve = Constant(0.0), Curve(tmp_path / "curve.json", "Hopper-v5", points=0, seed=0)
    curve(100, 100, policy)
    assert policy.asked == 0 and curve.points == [] and curve.best is None


class OnAnotherDevice(Constant):
    device = "meta"

    def act(self, observations, *, generator):
        assert observations.device.type == "meta"
        return super().act(observations.new_zeros(len(observations), device="cpu"), generator=None)


def test_a_policy_is_evaluated_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "Generator", _GeneratorOf)
    policy = OnAnotherDevice(0.0)
    Curve(tmp_path / "curve.json", "Hopper-v5", points=1, seed=0, episodes=1)(10, 10, policy)
    assert policy.asked > 0


class _GeneratorOf:
    """As torch.Generator, which has none on the device "meta"."""

    def __init__(self, device="cpu"):
        self.device = torch.device(device)

    def manual_seed(self, seed):
        return self
