"""Where episodes of D4RL's environments end, against D4RL's registered limits and its pen."""

import importlib.util
from typing import Any

import numpy as np
import pytest

from rtb_rl.errors import InputError
from rtb_rl.rl.catalogue import ENVIRONMENTS, environment_of
from rtb_rl.rl.data.readers import load_dataset
from rtb_rl.rl.episodes.environments import flat_keys, make_environment
from rtb_rl.rl.episodes.scores import reference_returns

pytestmark = pytest.mark.mujoco


def make(env_id) -> Any:
    """The environment; skips where the extra that it needs is not installed."""
    try:
        return make_environment(env_id)
    except InputError:
        if importlib.util.find_spec("gymnasium_robotics") is None:
            pytest.skip("the extra `robotics` is not installed")
        raise


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_environment_of_the_catalogue_ends_at_d4rls_limit(name):
    env = make(ENVIRONMENTS[name].env_id)
    assert env.spec is not None
    assert env.spec.max_episode_steps == ENVIRONMENTS[name].horizon
    env.close()


@pytest.mark.parametrize(
    ("name", "horizon"),
    [("pen-human-v1", 100), ("maze2d-open-v0", 150), ("maze2d-open-dense-v0", 150)],
)
def test_an_episode_that_nothing_ends_is_cut_at_the_limit(name, horizon):
    environment = environment_of(name)
    assert environment is not None
    env = make(environment.env_id)
    env.reset(seed=0)
    ends = []
    while not ends or not any(ends[-1]):
        ends.append(env.step(np.zeros(env.action_space.shape, np.float32))[2:4])
    assert len(ends) == horizon
    assert ends[-1] == (False, True)


def test_the_pen_ends_the_episode_where_it_drops():
    env = make("pen-cloned-v1")
    hand, still = env.unwrapped, np.zeros(24, np.float32)
    env.reset(seed=0)
    assert not env.step(still)[2]
    height = hand.data.xpos[hand.obj_body_id]
    before = height[2]
    for sinks, dropped in ((before - 0.08, False), (before - 0.07, True)):
        positions = hand.init_qpos.copy()
        positions[-6] += sinks
        hand.set_state(positions, np.zeros(hand.model.nv))
        _, _, terminated, truncated, _ = env.step(still)
        assert abs(height[2] - 0.075) < 0.006
        assert (terminated, truncated) == (height[2] < 0.075, False) == (dropped, False)


def test_gymnasiums_pen_is_left_as_it_is():
    env = make("AdroitHandPen-v1")
    assert env.spec is not None and env.spec.max_episode_steps == 200
    assert reference_returns("AdroitHandPen-v1") is None
    assert reference_returns("pen") == reference_returns("pen-human-v1") is not None


def test_data_of_the_open_maze_are_position_and_velocity():
    assert flat_keys("maze2d-open") == flat_keys("PointMaze_Open-v3") == ("observation",)
    env = make("maze2d-open")
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(observation[:2], env.unwrapped.point_env.data.qpos)
    assert observation.shape == (4,)
    arrays = {
        "observations": np.zeros((9, 4)),
        "actions": np.zeros((9, 2)),
        "rewards": np.zeros(9),
        "terminals": np.zeros(9),
        "timeouts": np.arange(9) % 3 == 2,
    }
    assert load_dataset(arrays, env_id="maze2d-open").env_id == "maze2d-open"
