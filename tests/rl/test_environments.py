"""Flat observations against the environments' own state; refusals name both sides."""

import importlib.util
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from rtb_rl.errors import InputError
from rtb_rl.rl.episodes.environments import action_box, check_environment, make_environment


class Goal(gymnasium.Env):
    """A dict observation."""

    observation_space = spaces.Dict(
        {"observation": spaces.Box(-9, 9, (2,)), "desired_goal": spaces.Box(-9, 9, (1,))}
    )
    action_space = spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, 4.0]), dtype=np.float64)

    def reset(self, *, seed=None, options=None):
        return {"observation": np.array([1.0, 2.0]), "desired_goal": np.array([3.0])}, {}


class Unbounded(Goal):
    action_space = spaces.Box(-np.inf, np.inf, (2,))


class Picture(Goal):
    observation_space = spaces.Box(0, 1, (2, 2))


@pytest.fixture(autouse=True)
def registered():
    environments = {"TinyGoal-v0": Goal, "TinyUnbounded-v0": Unbounded, "TinyPicture-v0": Picture}
    for env_id, kind in environments.items():
        gymnasium.register(env_id, kind)
    yield
    for env_id in environments:
        del gymnasium.registry[env_id]


def test_unknown_dict_observations_are_flattened_as_gymnasium_does():
    env = make_environment("TinyGoal-v0")
    assert env.observation_space.shape == (3,)
    np.testing.assert_array_equal(env.reset()[0], [3.0, 1.0, 2.0])


def test_action_box_is_the_environments_own():
    low, high = action_box(make_environment("TinyGoal-v0"))
    np.testing.assert_array_equal([low, high], [[-1, 0], [1, 4]])
    assert low.dtype == high.dtype == np.float32


@pytest.mark.parametrize(
    ("env_id", "text"),
    [
        ("Hoper-v5", "Hopper-v5"),
        ("Hopper-v2", r"Hopper-v4, Hopper-v5|Hopper-v5, Hopper-v4"),
        ("Hopper-v9", "Hopper-v5"),
        ("nowhere/x-v0", "nearest ids"),
        ("not an id!", "nearest ids"),
        ("CartPole-v1", "bounded box"),
        ("TinyUnbounded-v0", "bounded box"),
        ("TinyPicture-v0", "one vector"),
    ],
)
def test_environments_that_cannot_be_used_are_refused(env_id, text):
    with pytest.raises(InputError, match=text) as refused:
        make_environment(env_id)
    assert repr(env_id) in str(refused.value) or "Tiny" in str(refused.value)


def test_a_missing_robotics_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(InputError, match=r"rtb-rl\[robotics\]"):
        make_environment("AdroitHandDoor-v1")


def test_check_environment_names_both_sides():
    env = make_environment("TinyGoal-v0")
    check_environment(env, 3, 2, "TinyGoal-v0", "mine")
    with pytest.raises(
        InputError, match=r"observations of data set 'mine' have 4 .* 'TinyGoal-v0'"
    ):
        check_environment(env, 4, 2, "TinyGoal-v0", "mine")
    with pytest.raises(InputError, match=r"actions .* have 5 numbers, .* have 2"):
        check_environment(env, 3, 5, "TinyGoal-v0", "mine")


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5"])
def test_plain_environments_are_left_as_they_are_and_without_notice(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make_environment(env_id)
    assert env.observation_space.shape == (11,)
    assert env.spec is not None and env.spec.max_episode_steps == 1000


def robotics(env_id, capsys):
    if importlib.util.find_spec("gymnasium_robotics") is None:
        pytest.skip("the extra `robotics` is not installed")
    env = make_environment(env_id)
    observation, _ = env.reset(seed=0)
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == ""
    assert env.observation_space.shape == observation.shape
    return env, observation


@pytest.mark.mujoco
def test_ant_maze_puts_the_position_in_front(capsys):
    env, observation = robotics("AntMaze_UMaze-v4", capsys)
    maze = env.unwrapped
    np.testing.assert_array_equal(observation[:15], maze.data.qpos)
    np.testing.assert_array_equal(observation[15:], maze.data.qvel)


@pytest.mark.mujoco
@pytest.mark.parametrize(
    ("env_id", "goal_cell", "limit"),
    [
        ("antmaze-umaze-v2", (0, 2), 700),
        ("antmaze-medium-play-v2", (5, 5), 1000),
        ("antmaze-large-diverse-v2", (8, 6), 1000),
    ],
)
def test_d4rl_ant_maze_has_d4rls_frame_goal_and_physics(env_id, goal_cell, limit, capsys):
    env, observation = robotics(env_id, capsys)
    maze = env.unwrapped
    assert observation.shape == (29,)
    assert env.spec.max_episode_steps == limit
    assert maze.ant_env.dt == pytest.approx(0.1)
    assert maze.model.actuator_gear[0, 0] == 30
    starts = np.array([env.reset(seed=seed)[0][:2] for seed in range(20)])
    assert np.abs(starts).max() <= 0.1 and starts.std() > 0.03
    goals = []
    for seed in range(20):
        env.reset(seed=seed)
        goals.append(maze.goal - env.origin - 4 * np.array(goal_cell))
    assert np.min(goals) >= 0 and np.max(goals) <= 1.5 and np.std(goals) > 0.2


@pytest.mark.mujoco
def test_d4rl_ant_maze_pays_once_and_ends_at_the_goal(capsys):
    env, _ = robotics("antmaze-umaze-v2", capsys)
    maze, still = env.unwrapped, np.zeros(8, np.float32)
    maze.goal = maze.data.qpos[:2] + np.array([0.0, 0.6])
    assert env.step(still)[1:3] == (0.0, False)
    maze.goal = maze.data.qpos[:2] + np.array([0.0, 0.45])
    assert env.step(still)[1:3] == (1.0, True)


@pytest.mark.mujoco
def test_kitchen_has_gymnasiums_59_numbers_or_d4rls_60(capsys):
    _, plain = robotics("FrankaKitchen-v1", capsys)
    assert plain.shape == (59,)
    env, observation = robotics("kitchen-mixed-v0", capsys)
    kitchen = env.unwrapped
    assert kitchen.tasks_to_complete == {"microwave", "kettle", "bottom burner", "light switch"}
    np.testing.assert_allclose(observation[:30], kitchen.data.qpos, atol=0.02)
    goal = np.zeros(30)
    goal[11:13], goal[17:19], goal[22] = (-0.88, -0.01), (-0.69, -0.05), -0.75
    goal[23:] = (-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06)
    np.testing.assert_array_equal(observation[30:], goal)


@pytest.mark.mujoco
def test_point_maze_hand_and_ant_sizes(capsys):
    assert robotics("PointMaze_UMaze-v3", capsys)[1].shape == (4,)
    assert robotics("AdroitHandDoor-v1", capsys)[1].shape == (39,)
    observation = make_environment("ant-medium-v2").reset(seed=0)[0]
    assert observation.shape == (111,)
    assert observation[:27].any() and not observation[27:].any()
