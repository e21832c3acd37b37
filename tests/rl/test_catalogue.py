"""The table of D4RL tasks against what D4RL published and against registered environments."""

import pytest

from rtb_rl.errors import InputError
from rtb_rl.rl.catalogue import (
    D4RL_TASKS,
    ENVIRONMENTS,
    SERVERS,
    environment_of,
    find_task,
)
from rtb_rl.rl.episodes.environment_ids import episode_limit

# Paths on D4RL's server, one of each family and every irregular one.
PUBLISHED = {
    "hopper-medium-v2": "gym_mujoco_v2/hopper_medium-v2.hdf5",
    "walker2d-medium-replay-v0": "gym_mujoco/walker_mixed.hdf5",
    "halfcheetah-medium-replay-v0": "gym_mujoco/halfcheetah_mixed.hdf5",
    "ant-full-replay-v2": "gym_mujoco_v2/ant_full_replay-v2.hdf5",
    "antmaze-umaze-v0": "ant_maze_new/"
    "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse.hdf5",
    "antmaze-large-play-v2": "ant_maze_v2/"
    "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
    "kitchen-complete-v0": "kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5",
    "kitchen-mixed-v0": "kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5",
    "door-cloned-v0": "hand_dapg/door-demos-v0-bc-combined.hdf5",
    "pen-human-v1": "hand_dapg_v1/pen-human-v1.hdf5",
    "maze2d-open-v0": "maze2d/maze2d-open-sparse.hdf5",
    "maze2d-umaze-v1": "maze2d/maze2d-umaze-sparse-v1.hdf5",
    "maze2d-large-dense-v1": "maze2d/maze2d-large-dense-v1.hdf5",
}


def test_paths_are_those_that_d4rl_published():
    assert {name: D4RL_TASKS[name].path for name in PUBLISHED} == PUBLISHED


def test_every_locomotion_level_and_version_is_there():
    bodies = ("halfcheetah", "hopper", "walker2d", "ant")
    levels = ("random", "medium", "expert", "medium-replay", "medium-expert")
    names = {f"{body}-{level}-v{v}" for body in bodies for level in levels for v in (0, 1, 2)}
    assert names <= set(D4RL_TASKS)
    assert {f"{body}-full-replay-v2" for body in bodies} <= set(D4RL_TASKS)
    assert "hopper-full-replay-v0" not in D4RL_TASKS


def test_no_two_tasks_share_a_file():
    files = [task.file_name for task in D4RL_TASKS.values()]
    assert len(set(files)) == len(files)


@pytest.mark.parametrize(
    ("name", "env_id", "horizon"),
    [
        ("halfcheetah-medium-replay-v2", "HalfCheetah-v4", 1000),
        ("ant-expert-v1", "ant", 1000),
        ("antmaze-umaze-diverse-v2", "antmaze-umaze-v2", 700),
        ("antmaze-medium-play-v0", "antmaze-medium-v2", 1000),
        ("kitchen-partial-v0", "kitchen-partial-v0", 280),
        ("pen-human-v1", "pen", 100),
        ("maze2d-open-dense-v0", "maze2d-open-dense", 150),
        ("relocate-expert-v0", "AdroitHandRelocate-v1", 200),
        ("maze2d-umaze-v1", "PointMaze_UMaze-v3", 300),
        ("maze2d-large-dense-v1", "PointMaze_LargeDense-v3", 800),
    ],
)
def test_tasks_name_the_environment_to_evaluate_in(name, env_id, horizon):
    task = find_task(name)
    assert (task.env_id, task.horizon) == (env_id, horizon)


def test_the_mirror_is_asked_first_and_d4rls_own_server_last():
    urls = find_task("hopper-medium-v2").urls
    assert len(urls) == len(SERVERS)
    assert urls[0].endswith("/hopper_medium-v2.hdf5")
    assert urls[-1].endswith("/offline_rl/gym_mujoco_v2/hopper_medium-v2.hdf5")


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(InputError, match=r"'hoper-medium-v2'.*hopper-medium-v2"):
        find_task("hoper-medium-v2")
    with pytest.raises(InputError, match="look like hopper-medium-v2"):
        find_task("xyzzy")


@pytest.mark.parametrize(
    ("stem", "env_id"),
    [
        ("hopper-medium-replay", "Hopper-v4"),
        ("hopper_expert-v2", "Hopper-v4"),
        ("hopper-expert-demos", "Hopper-v4"),
        ("door-human", "AdroitHandDoor-v1"),
        ("maze2d-umaze-dense", "PointMaze_UMazeDense-v3"),
        ("mini_kitchen_microwave_kettle_light_slider-v0", "kitchen-complete-v0"),
        (
            "Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse_fixed",
            "antmaze-medium-v2",
        ),
    ],
)
def test_file_stems_point_to_environments(stem, env_id):
    environment = environment_of(stem)
    assert environment is not None
    assert environment.env_id == env_id


@pytest.mark.parametrize("stem", ["my-data", "hopperlike", "Ant_maze_of_my_own", "mujoco/hopper/x"])
def test_other_stems_point_nowhere(stem):
    assert environment_of(stem) is None


def test_only_locomotion_has_an_episode_limit():
    assert episode_limit("Hopper-v4") == episode_limit("Walker2d-v5") == 1000
    assert episode_limit("AdroitHandDoor-v1") is None
    assert episode_limit(None) is None


def test_the_simulators_are_registered():
    gymnasium = pytest.importorskip("gymnasium")
    gymnasium.register_envs(pytest.importorskip("gymnasium_robotics"))
    assert {known.simulator for known in ENVIRONMENTS.values()} <= set(gymnasium.registry)
