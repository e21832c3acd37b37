"""Minari data are evaluated in the environment that they say: its options and its limit."""

import importlib.util
import json
from functools import partial
from typing import Any

import gymnasium
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

from rtb_rl.errors import InputError
from rtb_rl.rl import evaluate, load_dataset, make_environment, summarise
from rtb_rl.rl.critics.training import critic_rewards
from rtb_rl.rl.data.dataset import check_spaces
from rtb_rl.rl.episodes.environment_ids import episode_limit
from rtb_rl.rl.episodes.environments import flat_keys
from rtb_rl.rl.episodes.scores import reference_returns

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")
NAME = "own/data-v0"


@pytest.fixture(autouse=True)
def own_minari_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


def record(env, eval_env=None, steps=4):
    """Two episodes of random actions as a Minari data set."""
    buffers = []
    for number in range(2):
        env.action_space.seed(number)
        observations, actions = [env.reset(seed=number)[0]], []
        for _ in range(steps):
            actions.append(env.action_space.sample())
            observations.append(env.step(actions[-1])[0])
        buffer = EpisodeBuffer(
            id=number,
            observations=stacked(observations),
            actions=np.stack(actions),  # pyright: ignore
            rewards=[0.0] * steps,
            terminations=[False] * steps,
            truncations=[False] * (steps - 1) + [True],
        )
        buffers.append(buffer)
    minari.create_dataset_from_buffers(
        NAME,
        buffers,
        env=env,
        eval_env=eval_env,
        algorithm_name="-",
        author="-",
        author_email="-",
        code_permalink="-",
        description="-",
        data_format="hdf5",
    )
    return load_dataset(NAME)


def stacked(observations) -> Any:
    if isinstance(observations[0], dict):
        return {key: stacked([one[key] for one in observations]) for key in observations[0]}
    return np.stack(observations)


def told(dataset):
    """What is remarked of the environment."""
    return [note for note in dataset.notes if not note.startswith("actions rescaled")]


class Still:
    """Does nothing, in `size` numbers."""

    def __init__(self, size):
        self.size = size

    def act(self, observations, *, generator):
        return torch.zeros(len(observations), self.size)


def test_options_and_limit_of_the_recorded_environment_are_those_of_the_evaluation():
    dataset = record(gymnasium.make("Pendulum-v1", g=2.0, max_episode_steps=50))
    assert dataset.env_id == 'Pendulum-v1{"g":2.0,"max_episode_steps":50}'
    assert told(dataset) == []
    records = evaluate(Still(1), dataset.env_id, episodes=2, seed=0)
    assert records.lengths == [50, 50]
    recovered = minari.load_dataset(NAME).recover_environment()
    own = make_environment(dataset.env_id)
    np.testing.assert_array_equal(recovered.reset(seed=3)[0], own.reset(seed=3)[0])
    push = np.full(1, 0.5, np.float32)
    for _ in range(50):
        np.testing.assert_array_equal(recovered.step(push)[0], own.step(push)[0])


def test_the_evaluation_environment_comes_first_and_the_recorded_one_is_noted():
    recorded, evaluated = (gymnasium.make("Pendulum-v1", g=g) for g in (2.0, 5.0))
    dataset = record(recorded, evaluated)
    assert dataset.env_id == 'Pendulum-v1{"g":5.0}'
    assert told(dataset) == ['recorded in Pendulum-v1{"g":2.0}']
    assert make_environment(dataset.env_id).unwrapped.g == 5.0  # pyright: ignore


def test_what_the_registered_environment_has_is_no_option():
    dataset = record(gymnasium.make("Pendulum-v1", render_mode="rgb_array", max_episode_steps=200))
    assert (dataset.env_id, told(dataset)) == ("Pendulum-v1", [])


def test_a_recording_without_limit_is_evaluated_with_the_registered_one():
    env = gymnasium.make("Pendulum-v1", max_episode_steps=-1)
    assert env.spec is not None and env.spec.max_episode_steps in {None, -1}
    assert record(env).env_id == "Pendulum-v1"


def test_a_given_environment_comes_first_of_all_and_the_recorded_one_is_noted():
    record(gymnasium.make("Pendulum-v1", g=2.0))
    dataset = load_dataset(NAME, env_id="Pendulum-v1")
    assert dataset.env_id == "Pendulum-v1"
    assert told(dataset) == ['recorded in Pendulum-v1{"g":2.0}']
    given = load_dataset(NAME, env_id='Pendulum-v1{"g": 2.0}')
    assert given.env_id == 'Pendulum-v1{"g":2.0}'
    assert told(given) == [] and given.sha256 == dataset.sha256
    assert 'Pendulum-v1{"g":2.0}' in str(summarise(given))


def test_an_environment_that_is_not_registered_is_named_with_its_options():
    gymnasium.register("Swing-v0", "gymnasium.envs.classic_control.pendulum:PendulumEnv")
    try:
        record(gymnasium.make("Swing-v0", g=2.0))
    finally:
        del gymnasium.registry["Swing-v0"]
    dataset = load_dataset(NAME)
    assert dataset.env_id == 'Swing-v0{"g":2.0}'
    with pytest.raises(InputError, match="'Swing-v0' is unknown"):
        make_environment(dataset.env_id)


@pytest.mark.parametrize(
    ("env_id", "text"),
    [
        ('Pendulum-v1{"g":2.0', "options of environment .* no JSON"),
        ('Pendulum-v1{"gravity":2.0}', "'Pendulum-v1' can't be made with options .*gravity"),
        ('Pendulum-v1{"id":"Hopper-v5"}', "'Pendulum-v1' can't be made with options .*'id'"),
        ('Hopper-v5{"frame_skip":"many"}', "'Hopper-v5' can't be made with options .*many"),
        ('Hoper-v5{"frame_skip":2}', "'Hoper-v5' is unknown.*Hopper-v5"),
    ],
)
def test_options_that_cannot_be_used_are_refused(env_id, text):
    with pytest.raises(InputError, match=text):
        make_environment(env_id)


def test_options_make_another_environment_than_d4rls_but_of_the_same_family():
    assert reference_returns("Hopper-v4") is not None
    assert reference_returns('Hopper-v4{"max_episode_steps":500}') is None
    assert reference_returns('pen{"reward_type":"sparse"}') is None
    assert episode_limit('Hopper-v4{"terminate_when_unhealthy":false}') == 1000
    assert episode_limit('Hopper-v4{"max_episode_steps":500}') == 500
    assert episode_limit('AdroitHandDoor-v1{"max_episode_steps":300}') is None
    assert critic_rewards("mine", 'AntMaze_UMaze-v4{"reward_type":"dense"}') == "scaled"
    assert critic_rewards("mine", 'AntMaze_UMaze-v4{"reward_type":"sparse"}') == "minus one"


MAP = [[1, 1, 1, 1, 1], [1, "r", 0, 0, 1], [1, 1, 1, 0, 1], [1, "g", 0, 0, 1], [1, 1, 1, 1, 1]]


@pytest.mark.mujoco
@pytest.mark.parametrize(
    ("env_id", "recorded", "evaluated", "carried"),
    [
        ("Hopper-v5", {}, {}, {}),
        ("Ant-v5", {}, {"include_cfrc_ext_in_observation": True}, None),
        ("AntMaze_UMaze-v4", {}, {}, {}),
        ("AntMaze_UMaze-v4", {"continuing_task": False}, {"maze_map": MAP}, {"maze_map": MAP}),
        (
            "PointMaze_UMaze-v3",
            {"reset_target": True, "max_episode_steps": 1000},
            {"maze_map": MAP},
            {"maze_map": MAP},
        ),
        ("FrankaKitchen-v1", {"tasks_to_complete": ["kettle"]}, None, None),
        ("AdroitHandDoor-v1", {"max_episode_steps": 300}, {}, {}),
    ],
)
def test_minaris_own_tasks_are_evaluated_in_their_evaluation_environment(
    env_id, recorded, evaluated, carried
):
    if not env_id.startswith(("Hopper", "Ant-")):
        if importlib.util.find_spec("gymnasium_robotics") is None:
            pytest.skip("the extra `robotics` is not installed")
        make_environment(env_id).close()  # registers it
    plainly = partial(gymnasium.make, disable_env_checker=True)
    evaluation = None if evaluated is None else plainly(env_id, **evaluated)
    dataset = record(plainly(env_id, **recorded), evaluation)
    expected = (evaluated or recorded) if carried is None else carried
    assert dataset.env_id is not None
    plain, brace, options = dataset.env_id.partition("{")
    assert (plain, json.loads(brace + options or "{}")) == (env_id, expected)
    env = make_environment(dataset.env_id)
    check_spaces(dataset, env.observation_space, env.action_space)
    assert flat_keys(dataset.env_id) == flat_keys(env_id)
    if expected.get("maze_map"):
        assert env.unwrapped.maze.maze_map == MAP  # pyright: ignore
    if "tasks_to_complete" in expected:
        assert env.unwrapped.tasks_to_complete == {"kettle"}  # pyright: ignore
