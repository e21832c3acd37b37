"""OGBench's files as transitions, by hand; its package by a small one of the same interface."""

import importlib
import sys
from dataclasses import dataclass

import gymnasium
import numpy as np
import pytest
import torch

from rtb_rl.errors import InputError
from rtb_rl.rl.data.ogbench_data import is_ogbench, task_of_file
from rtb_rl.rl.data.readers import load_dataset
from rtb_rl.rl.data.summary import summarise
from rtb_rl.rl.episodes.environments import make_environment
from rtb_rl.rl.episodes.evaluation import evaluate

# Two trajectories, of 3 and 2 states on a line; the last action of each leads nowhere.
STATES = np.array([[0.0], [1.0], [2.0], [5.0], [2.0]], np.float32)
ACTIONS = np.array([[0.1], [0.2], [9.0], [0.3], [9.0]], np.float32)
RAW = {
    "observations": STATES,
    "actions": ACTIONS,
    "terminals": np.array([0, 0, 1, 0, 1]),
    "qpos": STATES,
    "qvel": STATES,
}
# The same with the goal at 1, as the package gives it.
REWARDS, MASKS = np.array([-1, 0, -1.0]), np.array([1, 0, 1.0])
COMPACT = {
    **{key: RAW[key] for key in ("observations", "actions")},
    "terminals": np.array([0, 1, 1, 1, 1.0]),
    "valids": np.array([1, 1, 0, 1, 0.0]),
    "rewards": np.array([-1, 0, -1, -1, -1.0]),
    "masks": np.array([1, 0, 1, 1, 1.0]),
}
REGULAR = {
    "observations": STATES[[0, 1, 3]],
    "next_observations": STATES[[1, 2, 4]],
    "actions": ACTIONS[[0, 1, 3]],
    "terminals": np.array([0, 1, 1.0]),
    "rewards": REWARDS,
    "masks": MASKS,
}
ENV_ID = "antmaze-medium-singletask-task2-v0"
NAME = "ogbench:antmaze-medium-navigate-singletask-task2-v0"

PACKAGE = '''
import gymnasium, numpy as np

class Line(gymnasium.Env):
    """A state on a line that moves by the action; solved within 0.1 of the task's number - 1."""
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    _noise, _maze_unit = 1, 0.8

    def __init__(self, reward_task_id):
        self._reward_task_id = reward_task_id

    def add_noise(self, position):
        return tuple(np.random.uniform(-0.2, 0.2, 2))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal = self._reward_task_id - 1.0
        self.x = self.add_noise((0.0, 0.0))[0]
        return np.array([self.x]), {}

    def step(self, action):
        success = abs(self.x - self.goal) <= 0.1
        self.x += float(action[0])
        return np.array([self.x]), success - 1.0, success, False, {"success": float(success)}

gymnasium.register(
    "antmaze-medium-singletask-task2-v0", Line, max_episode_steps=6, kwargs={"reward_task_id": 2}
)
'''
RELABELLING = """
import numpy as np

def relabel_dataset(env_name, env, dataset):
    assert env.unwrapped._reward_task_id is not None
    env.reset()
    solved = np.abs(dataset["qpos"][:, 0] - env.unwrapped.goal) <= 0.1
    dataset["rewards"], dataset["masks"] = solved - 1.0, 1.0 - solved
"""


def forget_ogbench() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "ogbench"]:
        del sys.modules[name]
    gymnasium.registry.pop(ENV_ID, None)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `ogbench` in front of any other, whose folder of data is the one returned."""
    data = tmp_path / "data"
    data.mkdir()
    root = tmp_path / "packages" / "ogbench"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text(PACKAGE)
    (root / "relabel_utils.py").write_text(RELABELLING)
    (root / "utils.py").write_text(
        f"DATASET_URL = 'file:///none'\nDEFAULT_DATASET_DIR = {str(data)!r}"
    )
    forget_ogbench()
    monkeypatch.syspath_prepend(str(root.parent))
    importlib.invalidate_caches()
    yield data
    forget_ogbench()


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)


def save(folder, arrays, name="antmaze-medium-navigate-v0"):
    path = folder / f"{name}.npz"
    np.savez(path, **arrays)
    return path


def check_transitions(dataset) -> None:
    """What follows by hand from STATES with the goal at 1."""
    assert dataset.observations.flatten().tolist() == [0, 1, 5]
    assert dataset.next_observations.flatten().tolist() == [1, 2, 2]
    torch.testing.assert_close(dataset.actions.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert dataset.rewards.tolist() == [-1, 0, -1]
    assert dataset.terminated.tolist() == [False, True, False]
    assert dataset.truncated.tolist() == [False, False, True]
    assert dataset.log.returns.tolist() == [1, 0] and dataset.log.lengths.tolist() == [2, 1]
    assert dataset.reference_returns == (0, 1) and dataset.source == "ogbench"
    assert dataset.env_id == f"ogbench:{ENV_ID}"


@pytest.mark.parametrize("arrays", [RAW, COMPACT, REGULAR], ids=["raw", "compact", "regular"])
def test_every_layout_of_a_file_gives_the_same_transitions(arrays, package, tmp_path):
    dataset = load_dataset(save(tmp_path, arrays), env_id=ENV_ID)
    check_transitions(dataset)
    assert dataset.name == NAME
    assert summarise(dataset).normalised == pytest.approx(50)


@pytest.mark.parametrize("arrays", [COMPACT, REGULAR], ids=["compact", "regular"])
def test_a_file_with_rewards_is_read_without_the_package(arrays, no_package, tmp_path):
    check_transitions(load_dataset(save(tmp_path, arrays), env_id=ENV_ID))


def test_a_task_is_read_by_name_from_the_folder_of_the_package(package):
    save(package, RAW)
    check_transitions(load_dataset(NAME))


def test_a_trajectory_that_stays_solved_counts_once(tmp_path):
    always = {**REGULAR, "rewards": np.zeros(3), "masks": np.zeros(3)}
    log = load_dataset(save(tmp_path, always), env_id=ENV_ID).log
    assert log.returns.tolist() == [1, 1]


def test_two_tasks_of_one_file_are_two_data_sets(tmp_path):
    one = load_dataset(save(tmp_path, REGULAR), env_id=ENV_ID)
    other = {**REGULAR, "rewards": REWARDS[::-1], "masks": MASKS[::-1] * [1, 1, 0]}
    two = load_dataset(save(tmp_path, other), env_id=ENV_ID.replace("task2", "task3"))
    assert one.sha256 != two.sha256 and one.name != two.name


def test_a_missing_package_is_named_with_its_extra(no_package, tmp_path):
    path = save(tmp_path, RAW)
    for call in (
        lambda: load_dataset(NAME),
        lambda: load_dataset(path, env_id=ENV_ID),
        lambda: make_environment(f"ogbench:{ENV_ID}"),
    ):
        with pytest.raises(InputError, match=r"needs the package ogbench.*'rtb-rl\[ogbench\]'"):
            call()


@pytest.mark.parametrize(
    ("name", "env_id", "message"),
    [
        ("ogbench:antmaze-medium-navigate-v0", None, "no single task of OGBench"),
        ("ogbench:visual-cube-single-play-singletask-v0", None, "vectors as observations"),
        (NAME, ENV_ID.replace("task2", "task3"), "has the rewards of ogbench:antmaze-medium-sing"),
    ],
)
def test_names_that_are_no_single_task_are_refused(name, env_id, message, package):
    with pytest.raises(InputError, match=message):
        load_dataset(name, env_id=env_id)


@pytest.mark.parametrize(
    ("change", "env_id", "message"),
    [
        ({}, None, "no rewards until a task is chosen"),
        ({}, "Ant-v5", "no rewards until a task is chosen.*Ant-v5"),
        ({"terminals": np.array([0, 0, 1, 0, 0])}, ENV_ID, "last row must be the end"),
        ({"terminals": np.ones(5)}, ENV_ID, "others must have a successor"),
        ({"actions": ACTIONS[1:]}, ENV_ID, "differ in length: observations 5, actions 4"),
    ],
)
def test_broken_files_are_refused(change, env_id, message, package, tmp_path):
    with pytest.raises(InputError, match=message):
        load_dataset(save(tmp_path, RAW | change), env_id=env_id)


def test_files_with_timeouts_or_rewards_of_their_own_are_not_ogbenchs():
    assert not is_ogbench({**RAW, "timeouts": 0}) and not is_ogbench({**RAW, "rewards": 0})


def test_the_file_of_a_task_is_named_after_both():
    assert task_of_file("antmaze-medium-navigate-v0", ENV_ID) == NAME
    assert task_of_file("antmaze-medium-navigate-v0", "Ant-v5") == "antmaze-medium-navigate-v0"
    assert task_of_file("hopper-medium-replay", None) == "hopper-medium-replay"


@dataclass
class Walk:
    step: float

    def act(self, observations, *, generator):
        return torch.full((len(observations), 1), self.step)


def test_the_return_of_an_episode_is_its_success(package):
    # starts are within 0.2 of 0 and solved is within 0.1 of 1: steps of 0.2 hit it
    solved = evaluate(Walk(0.2), f"ogbench:{ENV_ID}", episodes=4, seed=0)
    assert all(0 < n <= 6 for n in solved.lengths)
    assert solved.returns == [float(ended) for ended in solved.terminated]
    assert evaluate(Walk(0.0), f"ogbench:{ENV_ID}", episodes=4, seed=0).returns == [0, 0, 0, 0]


def test_starts_follow_the_seed(package):
    first, second = (make_environment(f"ogbench:{ENV_ID}") for _ in range(2))
    np.testing.assert_array_equal(first.reset(seed=3)[0], second.reset(seed=3)[0])
    assert (first.reset(seed=4)[0] != second.reset(seed=3)[0]).all()
    assert abs(float(first.reset(seed=5)[0][0])) <= 0.2


@pytest.mark.mujoco
def test_the_real_environments_pay_success():
    pytest.importorskip("ogbench")
    first, second = (make_environment("ogbench:antmaze-medium-singletask-v0") for _ in range(2))
    np.testing.assert_array_equal(first.reset(seed=3)[0], second.reset(seed=3)[0])
    assert first.step(np.zeros(8, np.float32))[1:4] == (0.0, False, False)


@pytest.mark.mujoco
def test_the_real_relabelling_is_used(tmp_path):
    pytest.importorskip("ogbench")
    env_id = "ogbench:pointmaze-medium-singletask-v0"
    env = make_environment(env_id)
    env.reset(seed=0)
    goal = np.asarray(env.unwrapped.cur_goal_xy, np.float32)  # pyright: ignore
    states = goal + np.array([[9, 0], [0, 0], [0, 9]], np.float32)
    arrays = {"observations": states, "actions": 0 * states, "terminals": [0, 0, 1], "qpos": states}
    dataset = load_dataset(save(tmp_path, arrays, "pointmaze-medium-navigate-v0"), env_id=env_id)
    assert dataset.rewards.tolist() == [-1, 0] and dataset.log.returns.tolist() == [1]
