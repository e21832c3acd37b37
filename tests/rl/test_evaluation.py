"""Episode accounting against episodes whose lengths and rewards are known beforehand."""

import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from rtb_rl.errors import InputError
from rtb_rl.rl.episodes.environments import make_environment
from rtb_rl.rl.episodes.evaluation import EpisodeRecords, bootstrap_interval, derived_seed, evaluate

ENV_ID = "KnownLength-v0"
TIME_LIMIT = 7


class KnownLength(gymnasium.Env):
    """Lasts 2 to 9 steps, by its seed; pays 10 x length + action, so each episode is told apart."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-1.0, 3.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.time = int(self.np_random.integers(2, 10)), 0
        return np.array([self.length, 0.0]), {}

    def step(self, action):
        assert self.time < self.length, "stepped after its end"
        self.time += 1
        reward = 10.0 * self.length + float(action[0])
        return np.array([self.length, self.time]), reward, self.time == self.length, False, {}


@pytest.fixture(autouse=True)
def known_length():
    gymnasium.register(ENV_ID, KnownLength, max_episode_steps=TIME_LIMIT)
    yield
    del gymnasium.registry[ENV_ID]


class Clock:
    """Acts with a hundredth of the time it observes; keeps every batch."""

    def __init__(self):
        self.batches = []

    def act(self, observations, *, generator):
        self.batches.append(observations.clone())
        return observations[:, 1:] / 100


class Noise:
    def act(self, observations, *, generator):
        return torch.rand((len(observations), 1), generator=generator)


def true_lengths(seed, episodes):
    env = KnownLength()
    return [int(env.reset(seed=derived_seed(seed, 0, i))[0][0]) for i in range(episodes)]


@pytest.mark.parametrize("max_environments", [1, 3, 4, 100])
def test_every_episode_is_counted_once_and_whole(max_environments):
    episodes, seed, ended = 10, 5, []
    records = evaluate(
        Clock(),
        ENV_ID,
        episodes=episodes,
        seed=seed,
        max_environments=max_environments,
        progress=ended.append,
    )
    natural = true_lengths(seed, episodes)
    lengths = [min(length, TIME_LIMIT) for length in natural]
    assert min(natural) < TIME_LIMIT < max(natural)
    assert records.lengths == lengths
    assert records.terminated == [length <= TIME_LIMIT for length in natural]
    expected = [10 * n * k + k * (k - 1) / 200 for n, k in zip(natural, lengths, strict=True)]
    assert records.returns == pytest.approx(expected)
    assert sum(ended) == episodes


def test_one_policy_call_for_each_step_of_a_wave():
    policy = Clock()
    records = evaluate(policy, ENV_ID, episodes=5, seed=1, max_environments=3)
    calls = max(records.lengths[:3]) + max(records.lengths[3:])
    assert len(policy.batches) == calls
    assert {tuple(batch.shape) for batch in policy.batches} == {(3, 2), (2, 2)}
    assert policy.batches[0].dtype == torch.float32


def test_noise_of_an_episode_does_not_depend_on_when_others_end():
    seed, episodes = 2, 6
    records = evaluate(Noise(), ENV_ID, episodes=episodes, seed=seed)
    generator = torch.Generator().manual_seed(derived_seed(seed, 1, 0))
    noise = torch.stack([torch.rand((episodes, 1), generator=generator) for _ in range(TIME_LIMIT)])
    natural = true_lengths(seed, episodes)
    expected = [
        10 * natural[i] * records.lengths[i] + float(noise[: records.lengths[i], i].sum())
        for i in range(episodes)
    ]
    assert records.returns == pytest.approx(expected, rel=1e-6)


def test_equal_seeds_give_equal_records_and_others_other_ones():
    first, again, other = (evaluate(Noise(), ENV_ID, episodes=8, seed=s) for s in (3, 3, 4))
    assert first == again
    assert first.returns != other.returns


def test_summary_is_json_with_scores_of_the_reference():
    records = EpisodeRecords(returns=[0.0, 10.0], lengths=[1, 2], terminated=[True, False])
    summary = json.loads(json.dumps(records.summary((-10.0, 10.0))))
    assert summary["returns"] == [0.0, 10.0]
    assert summary["mean_return"] == 5.0
    assert summary["normalised_score"] == 75.0
    assert summary["normalised_score_interval"] == [50.0, 100.0]
    assert summary["mean_return_interval"] == [0.0, 10.0]
    without = records.summary()
    assert without["normalised_score"] is None and without["normalised_score_interval"] is None
    assert EpisodeRecords([1.0], [1], [True]).summary((0.0, 1.0))["mean_return_interval"] is None


def test_bootstrap_interval_approaches_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400).tolist()
    half = 1.96 * np.std(values) / 20
    low, high = bootstrap_interval(values)  # pyright: ignore
    assert low == pytest.approx(np.mean(values) - half, abs=0.02)
    assert high == pytest.approx(np.mean(values) + half, abs=0.02)


class Constant:
    def __init__(self, action):
        self.action = action

    def act(self, observations, *, generator):
        return torch.tensor(self.action).expand(len(observations), len(self.action))


@pytest.mark.parametrize("action", [[float("nan")], [float("inf")], [3.1], [-1.1], [0.0, 0.0]])
def test_actions_the_environment_does_not_take_are_refused(action):
    with pytest.raises(InputError, match="the environment takes"):
        evaluate(Constant(action), ENV_ID, episodes=2, seed=0)


def test_actions_on_the_border_of_the_box_are_taken():
    assert len(evaluate(Constant([3.0]), ENV_ID, episodes=2, seed=0).returns) == 2


@pytest.mark.parametrize("wrong", [{"episodes": 0}, {"seed": -1}, {"max_environments": 0}])
def test_wrong_counts_and_seeds_are_refused(wrong):
    with pytest.raises(InputError, match=str(next(iter(wrong.values())))):
        evaluate(Clock(), ENV_ID, **{"episodes": 2, "seed": 0} | wrong)


class Bends:
    """A deterministic feedback, so that a batch and single observations must act alike."""

    def act(self, observations, *, generator):
        return torch.sin(3 * observations[:, :3])


@pytest.mark.mujoco
@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5"])
def test_hopper_gives_the_returns_of_a_loop_by_hand(env_id):
    records = evaluate(Bends(), env_id, episodes=4, seed=0)
    returns, lengths = [], []
    for i in range(4):
        env = make_environment(env_id)
        observation, _ = env.reset(seed=derived_seed(0, 0, i))
        total, length, over = 0.0, 0, False
        while not over:
            batch = torch.tensor(observation, dtype=torch.float32)[None]
            action = Bends().act(batch, generator=None)[0].numpy()
            observation, reward, terminated, truncated, _ = env.step(action)
            total, length, over = total + float(reward), length + 1, terminated or truncated
        returns.append(total)
        lengths.append(length)
    assert records.lengths == lengths
    assert records.returns == pytest.approx(returns, rel=1e-12)
