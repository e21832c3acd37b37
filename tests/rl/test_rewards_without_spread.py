"""Data whose whole episodes have one return: nothing to scale by, so rewards stay as recorded."""

import json

import numpy as np
import pytest
import torch

from rtb_rl.rl import CriticSettings, fit_critic, load_dataset
from rtb_rl.rl.critics.training import scaled_for_critic

AS_RECORDED = "reward as recorded (returns have no spread to scale by)"


def recording(rewards, ends):
    """Rows with these rewards, of episodes that terminate in the rows `ends`."""
    rows = len(rewards)
    terminals = np.isin(np.arange(rows), ends)
    random = np.random.default_rng(0)
    return load_dataset(
        {
            "observations": random.normal(size=(rows, 2)).astype(np.float32),
            "actions": random.uniform(-1, 1, (rows, 1)).astype(np.float32),
            "rewards": np.asarray(rewards, np.float32),
            "terminals": terminals,
            "timeouts": np.zeros(rows, bool),
        }
    )


def solved(episodes=20, steps=5):
    """Episodes that pay 1 at their end, as demonstrations of a task do."""
    ends = np.arange(1, episodes + 1) * steps - 1
    return recording(np.isin(np.arange(episodes * steps), ends), ends)


CASES = {
    "sparse": solved,
    "one whole episode": lambda: recording([3.0] * 10, [9]),
    "one whole episode and a partial one": lambda: recording([3.0, 4.0] * 5, [4]),
    "nothing paid": lambda: recording([0.0] * 10, [4, 9]),
    "equal but for rounding": lambda: recording([0.1, 0.2, 0.3, 0.3, 0.2, 0.1], [2, 5]),
}


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_rewards_without_a_spread_of_returns_stay_as_recorded_and_it_is_said(case, published):
    dataset = CASES[case]()
    scaled, words = scaled_for_critic(dataset, CriticSettings(published_scaling=published))
    assert scaled is dataset
    assert words == AS_RECORDED


def test_a_spread_that_is_no_rounding_is_scaled_by():
    dataset = recording([1000.0, 0.0, 1000.0, 0.1], [1, 3])
    scaled, words = scaled_for_critic(dataset, CriticSettings())
    assert words.startswith("reward * ")
    torch.testing.assert_close(scaled.rewards, dataset.rewards * 1e4, rtol=1e-3, atol=0)


def test_a_critic_of_sparse_rewards_learns_the_discounted_reward(tmp_path):
    """Every row is the last of an episode that pays 1: Q is 1."""
    settings = CriticSettings(steps=400, batch=64, learning_rate=3e-3)
    dataset = solved(episodes=100, steps=1)
    critic = fit_critic(tmp_path, dataset, settings)
    q = critic.q(dataset.observations, dataset.actions)
    torch.testing.assert_close(q, torch.ones(100), atol=0.1, rtol=0)
    assert json.loads((tmp_path / "results.json").read_text())["rewards"] == AS_RECORDED
