"""Settings keyed by data set: which table each gets, what sources say, and what it is for."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rtb_rl.errors import InputError
from rtb_rl.rl import Budget, JobSettings, budget_for, load_dataset, read_tuning
from rtb_rl.rl.catalogue import D4RL_TASKS
from rtb_rl.rl.critics.training import scaled_for_critic
from rtb_rl.rl.episodes.scores import critic_rewards, return_scale
from rtb_rl.rl.jobs import opening
from rtb_rl.rl.jobs.budget import find_tuning

TOML = Path(__file__).parents[2] / "agents" / "rtb_iql.toml"
TABLES = tomllib.loads(TOML.read_text())
STEMS = {"hopper-medium-replay": 3.0, "halfcheetah-medium-replay": 3.0, "halfcheetah-medium": 1.0}
FAMILIES = {"antmaze", "antmaze-giant", "humanoidmaze", "antsoccer", "pointmaze"}
FAMILIES |= {"cube", "scene", "puzzle"}
# arXiv 2405.20971: the temperature alpha of RTB on each task
ALPHA = {
    "halfcheetah-medium-expert-v2": 0.1,
    "hopper-medium-expert-v2": 0.5,
    "walker2d-medium-expert-v2": 0.1,
    "halfcheetah-medium-v2": 0.05,
    "hopper-medium-v2": 0.1,
    "walker2d-medium-v2": 0.05,
    "halfcheetah-medium-replay-v2": 0.05,
    "hopper-medium-replay-v2": 0.05,
    "walker2d-medium-replay-v2": 0.1,
}
# No source names settings for ant and maze2d; those of locomotion are for v2.
BY_DEFAULT = re.compile(r"ant-.*|maze2d-.*|(halfcheetah|hopper|walker2d)-.*-v[01]")


def recording(name: str, lengths=(1000,) * 4):
    """Cut episodes whose rewards are 1, 2, 3, 4 a step, as a data set of this name."""
    rows = sum(lengths)
    timeouts = np.zeros(rows, bool)
    timeouts[np.cumsum(lengths) - 1] = True
    dataset = load_dataset(
        {
            "observations": np.arange(2.0 * rows, dtype=np.float32).reshape(rows, 2),
            "actions": np.zeros((rows, 1), np.float32),
            "rewards": np.repeat([1.0, 2.0, 3.0, 4.0], lengths).astype(np.float32),
            "terminals": np.zeros(rows, bool),
            "timeouts": timeouts,
        }
    )
    return replace(dataset, name=name)


def test_every_task_of_d4rl_has_a_table_or_the_default_by_decision():
    without = {name for name in D4RL_TASKS if find_tuning(TOML, name)[0] == "default"}
    assert without == {name for name in D4RL_TASKS if BY_DEFAULT.fullmatch(name)}


def test_every_table_is_of_a_known_data_set():
    ogbench = {f"ogbench:{family}" for family in FAMILIES}
    assert set(TABLES) <= {"default", *STEMS, *D4RL_TASKS, *ogbench}


@pytest.mark.parametrize("stem", STEMS)
def test_files_of_rollouts_keep_their_settings(stem):
    assert budget_for("full", read_tuning(TOML, stem)) == Budget().with_beta(STEMS[stem])


def test_a_table_without_settings_is_the_default_of_every_stage():
    assert budget_for("full", read_tuning(TOML, "my-data")) == Budget().with_beta(3.0)


@pytest.mark.parametrize("table", ["hopper-medium-v2", "default"])
def test_unknown_keys_are_refused_with_the_name_of_their_table(table, tmp_path):
    path = tmp_path / "tuning.toml"
    path.write_text(f"[{table}]\ndropout = 0.1\n[other]\nbeta = 1.0\n")
    with pytest.raises(InputError, match=rf"\[{table}\]: unknown dropout; known are beta, disc"):
        read_tuning(path, "other")


@pytest.mark.parametrize("name", ALPHA)
def test_published_temperatures_are_taken_with_the_scaling_they_were_published_for(name):
    tuning = read_tuning(TOML, name)
    assert tuning.beta == 1 / ALPHA[name]
    assert (tuning.expectile, tuning.discount, tuning.published_scaling) == (0.7, 0.99, True)
    dataset = recording(name)
    scaled, words = scaled_for_critic(dataset, budget_for("full", tuning).critic)
    assert "as published" in words
    # 999 rows of an episode are left, so windows of 1000 sum to 1001, 2002, 3003; whole 1000..4000
    torch.testing.assert_close(scaled.rewards, dataset.rewards * (1000 / 2002))
    assert return_scale(dataset) == pytest.approx(1000 / 3000)


def test_no_other_table_takes_the_published_scaling():
    assert {name for name, table in TABLES.items() if "published_scaling" in table} == set(ALPHA)


@pytest.mark.parametrize("name", [n for n in D4RL_TASKS if n.startswith("antmaze")])
def test_antmaze_pays_minus_one_a_step_and_is_evaluated_in_100_episodes(name):
    tuning = read_tuning(TOML, name)
    assert (tuning.beta, tuning.temperature, tuning.expectile) == (10.0, 10.0, 0.9)
    budget = budget_for("full", tuning)
    assert budget.episodes == 100 and budget.gaussian.temperature == 10.0
    assert (
        budget_for("smoke", tuning).episodes == budget_for("smoke", read_tuning(TOML, "")).episodes
    )
    dataset = recording(name)
    scaled, words = scaled_for_critic(dataset, budget.critic)
    assert words == "reward - 1" and torch.equal(scaled.rewards, dataset.rewards - 1)


@pytest.mark.parametrize("name", ["kitchen-mixed-v0", "pen-human-v1", "relocate-expert-v0"])
def test_kitchen_and_hands_keep_their_rewards(name):
    tuning = read_tuning(TOML, name)
    assert (tuning.beta, tuning.temperature, tuning.expectile) == (0.5, 0.5, 0.7)
    dataset = recording(name)
    assert scaled_for_critic(dataset, budget_for("full", tuning).critic)[0] is dataset


def test_rewards_of_a_file_are_treated_as_those_of_its_task():
    stem = "Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse_fixed"
    assert critic_rewards(stem) == "minus one"
    assert critic_rewards("mini_kitchen_microwave_kettle_light_slider-v0") == "recorded"
    assert critic_rewards("ogbench:antmaze-medium-navigate-singletask-v0") == "recorded"
    assert {critic_rewards(n) for n in (*STEMS, "ant-medium-v2", "my-data")} == {"scaled"}


@pytest.mark.parametrize(
    "name, env_id, treatment",
    [
        ("D4RL/antmaze/umaze-v1", "AntMaze_UMaze-v4", "minus one"),
        ("D4RL/antmaze/umaze-v1", None, "minus one"),
        ("D4RL/door/human-v2", None, "recorded"),
        ("D4RL/kitchen/complete-v2", None, "recorded"),
        ("mine", "AdroitHandPen-v1", "recorded"),
        ("mine", "pen", "recorded"),
        ("mine", "pen-human-v1", "recorded"),
        ("mine", "FrankaKitchen-v1", "recorded"),
        ("mine", "AntMaze_Large_Diverse_GR-v4", "minus one"),
        ("mine", "AntMaze_UMazeDense-v4", "scaled"),
        ("mine", "ogbench:antmaze-large-navigate-singletask-v0", "recorded"),
        ("mujoco/ant/medium-v0", "Ant-v5", "scaled"),
        ("local/hopper/medium-v0", "Hopper-v5", "scaled"),
        ("D4RL/pointmaze/umaze-v2", "PointMaze_UMaze-v3", "scaled"),
    ],
)
def test_rewards_of_minari_s_data_and_of_the_environment(name, env_id, treatment):
    """Minari's antmaze, hand and kitchen data were scaled as locomotion."""
    assert critic_rewards(name, env_id) == treatment


@pytest.mark.parametrize(
    "dataset, table",
    [
        ("local/halfcheetah/medium-v0", "halfcheetah-medium"),
        ("local/hopper/medium-replay-v0", "hopper-medium-replay"),
        ("local/hopper/medium-replay-200000-v0", "hopper-medium-replay"),
        ("local/hopper/mine-v0", "default"),
        ("mujoco/hopper/medium-v0", "default"),
    ],
)
def test_collected_data_find_their_table(dataset, table):
    key = opening._tuning_key(JobSettings(dataset=dataset))
    assert find_tuning(TOML, key)[0] == table


@pytest.mark.parametrize(
    ("name", "table", "discount"),
    [
        ("antmaze-medium-navigate-singletask-v0", "antmaze", 0.99),
        ("antmaze-giant-stitch-singletask-task2-v0", "antmaze-giant", 0.995),
        ("humanoidmaze-large-navigate-singletask-task5-v0", "humanoidmaze", 0.995),
        ("antsoccer-arena-navigate-singletask-v0", "antsoccer", 0.995),
        ("puzzle-4x4-play-singletask-task1-v0", "puzzle", 0.99),
    ],
)
def test_a_table_serves_all_tasks_of_a_family_of_ogbench(name, table, discount):
    found, tuning = find_tuning(TOML, f"ogbench:{name}")
    assert (found, tuning.discount) == (f"ogbench:{table}", discount)
    assert budget_for("full", tuning).episodes == 50
    assert find_tuning(TOML, f"ogbench:other{name}")[0] == "default"


def test_a_task_without_a_table_is_told_that_it_gets_the_default(capsys):
    for name in ("ant-medium-v2", "hopper-medium-v2", "my-data.hdf5", "hopper-medium-v0"):
        opening._tuning(JobSettings(dataset=name), TOML)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "no table for ant-medium-v2" in lines[0] and "beta 3, expectile 0.7" in lines[0]
    assert "no table for hopper-medium-v0" in lines[1]


def test_a_file_of_d4rl_gets_the_table_of_its_task():
    tuning = opening._tuning(JobSettings(dataset="folder/hopper_medium_expert-v2.hdf5"), TOML)
    assert tuning.beta == 2.0


def test_a_file_of_ogbench_gets_the_table_of_its_task():
    settings = JobSettings(
        dataset="folder/humanoidmaze-medium-navigate-v0.npz",
        env_id="humanoidmaze-medium-singletask-task3-v0",
    )
    assert opening._tuning(settings, TOML).discount == 0.995
