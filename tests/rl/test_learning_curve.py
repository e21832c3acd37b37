"""A learning curve: when a policy is looked at, what is kept, and which point is the best."""

import pytest
import torch

from rtb_rl.rl import Curve

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
    for done in range(20, 201, 20):
        curve(done, 200, Constant(0.1 if done < 100 else -1.0))
    assert [point["step"] for point in curve.points] == [80, 140, 200]
    assert {point["steps"] for point in curve.points} == {200}
    means = [sum(point["returns"]) / 2 for point in curve.points]
    assert curve.best["step"] == curve.points[means.index(max(means))]["step"]
    assert means[1] == means[2] != means[0]


def test_points_made_before_a_kill_are_not_made_again(tmp_path):
    for _ in range(2):
        policy = Constant(0.0)
        Curve(tmp_path / "curve.json", "Hopper-v5", points=2, seed=0, episodes=1)(50, 100, policy)
    assert policy.asked == 0


def test_without_points_nothing_is_evaluated(tmp_path):
    policy, curve = Constant(0.0), Curve(tmp_path / "curve.json", "Hopper-v5", points=0, seed=0)
    curve(100, 100, policy)
    assert policy.asked == 0 and curve.points == [] and curve.best is None
