"""Several files as one data set: what each gives alone, in order, and the same bytes every time."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import register
from tiny_grids import write_episodes

from rtb_rl.errors import InputError
from rtb_rl.rl import load_dataset
from rtb_rl.sweep.data import check_data, mix
from rtb_rl.sweep.grid import Grid


@pytest.fixture
def two(tmp_path):
    attributes = {"ref_min_score": -1500.0, "ref_max_score": -150.0}
    return [
        write_episodes(tmp_path / f"{name}.hdf5", seed=seed, episodes=3 + seed, **attributes)
        for seed, name in enumerate(["medium", "expert"])
    ]


def edit(path: str, change) -> str:
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def test_the_transitions_are_those_of_the_files_in_order(two, tmp_path):
    mixture = load_dataset(mix(two, tmp_path / "data" / "both.hdf5"))
    parts = [load_dataset(path) for path in two]
    assert len(mixture) == 50 * (3 + 4)
    for key in ("observations", "actions", "rewards", "next_observations", "terminated"):
        whole = torch.cat([getattr(part, key) for part in parts])
        assert torch.equal(getattr(mixture, key), whole), key
    returns = torch.cat([part.episode_returns() for part in parts])
    assert torch.equal(mixture.episode_returns(), returns)
    assert mixture.env_id == "Pendulum-v1" and mixture.name == "both"
    assert mixture.reference_returns == (-1500.0, -150.0)


def test_it_is_made_once_and_always_the_same(two, tmp_path):
    first = mix(two, tmp_path / "a" / "both.hdf5")
    bytes_of_first, moment = first.read_bytes(), first.stat().st_mtime_ns
    assert mix(two, first).stat().st_mtime_ns == moment
    assert mix(two, tmp_path / "b" / "both.hdf5").read_bytes() == bytes_of_first
    swapped = mix(two[::-1], tmp_path / "c" / "both.hdf5")
    assert swapped.read_bytes() != bytes_of_first
    with h5py.File(first) as file:
        assert [name for name, _ in json.loads(file.attrs["mixture_of"])] == [
            "medium.hdf5",
            "expert.hdf5",
        ]
    with pytest.raises(InputError, match=r"was made of .*medium.*and the grid asks for .*expert"):
        mix(two[::-1], first)


def test_what_only_one_file_has_is_left_out(two, tmp_path):
    edit(two[1], lambda file: file.__delitem__("infos/final_observations"))
    with h5py.File(mix(two, tmp_path / "both.hdf5")) as file:
        assert "infos/final_observations" not in file
    assert len(load_dataset(tmp_path / "both.hdf5")) == 50 * 7 - 7


def test_no_episode_goes_on_into_the_next_file(two, tmp_path):
    def leave_the_last_open(file):
        file["timeouts"][-1] = False

    edit(two[0], leave_the_last_open)
    alone, other = (load_dataset(path) for path in two)
    mixture = load_dataset(mix(two, tmp_path / "both.hdf5"))
    whole = torch.cat([alone.next_observations, other.next_observations])
    assert torch.equal(mixture.next_observations, whole)
    with h5py.File(tmp_path / "both.hdf5") as file:
        assert np.flatnonzero(file["timeouts"][:]).tolist() == [*range(49, 350, 50)]


def narrow(file):
    del file["observations"]
    file["observations"] = np.zeros((200, 2), np.float32)


def elsewhere(file):
    file.attrs["env"] = "Hopper-v4"


def without_rewards(file):
    del file["rewards"]


def one_final_short(file):
    final = file["infos/final_observations"][:-1]
    del file["infos/final_observations"]
    file["infos/final_observations"] = final


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (narrow, r"rows of observations are \(3,\) in .*medium.hdf5 and \(2,\) in .*expert.hdf5"),
        (elsewhere, r"env is Pendulum-v1 in .*medium.hdf5 and Hopper-v4 in .*expert.hdf5"),
        (without_rewards, "expert.hdf5 has no rewards; files of a mixture need"),
        (one_final_short, "expert.hdf5 has 3 rows of infos/final_observations for 4 episodes"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(change, complaint, two, tmp_path):
    edit(two[1], change)
    with pytest.raises(InputError, match=complaint):
        mix(two, tmp_path / "both.hdf5")
    assert not (tmp_path / "both.hdf5").exists()


def test_a_name_that_is_no_file_is_refused(two, tmp_path):
    with pytest.raises(InputError, match="there is no file hopper-medium-v2; a mixture is made"):
        mix([two[0], "hopper-medium-v2"], Path(tmp_path / "both.hdf5"))


def test_files_of_two_environments_that_do_not_say_so_are_refused(tmp_path):
    """D4RL's files have no attributes, and HalfCheetah and Walker2d have the same shapes."""
    names = ("halfcheetah_medium-v2", "walker2d_medium-v2")
    files = [
        write_episodes(tmp_path / f"{name}.hdf5", seed=seed, env="")
        for seed, name in enumerate(names)
    ]
    with pytest.raises(InputError, match="is of HalfCheetah-v4 and .*walker2d.* of Walker2d-v4"):
        mix(files, tmp_path / "both.hdf5")


def test_one_file_twice_is_no_mixture(two, tmp_path):
    copy = tmp_path / "copy.hdf5"
    copy.write_bytes(Path(two[0]).read_bytes())
    with pytest.raises(InputError, match="the mixture holds .*medium.hdf5 twice"):
        mix([two[0], str(copy)], tmp_path / "both.hdf5")


def test_agents_in_two_environments_are_no_task(tmp_path):
    path = write_episodes(tmp_path / "own.hdf5")
    grid = Grid(
        ("iql", "td3_bc"),
        (0,),
        {},
        {"own": {"dataset": path}},
        {"td3_bc": {"env_id": "rtb_rl_pendulum/Pendulum-v1"}},
    )
    register(
        id="rtb_rl_pendulum/Pendulum-v1", entry_point="gymnasium.envs.classic_control:PendulumEnv"
    )
    with pytest.raises(InputError, match="iql is evaluated in Pendulum-v1 and td3_bc in rtb_rl_p"):
        check_data(grid, {"own": path})
