"""Reading the same episodes from every format, and refusing what isn't one."""

from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from rtb_rl.errors import InputError
from rtb_rl.rl.catalogue import find_task
from rtb_rl.rl.data import download
from rtb_rl.rl.data.readers import load_dataset
from rtb_rl.rl.data.summary import summarise

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")
REAL = Path(__file__).parents[2].parent / "shared" / "data"
FINAL = "infos/final_observations"


def episodes_as_arrays(lengths=(3, 2), width: int = 11, actions: int = 3) -> dict[str, np.ndarray]:
    """A terminated and a cut episode of random rows, with the observation after each."""
    draw = np.random.default_rng(0)
    rows, last = sum(lengths), np.cumsum(lengths) - 1
    flags = {key: np.zeros(rows, bool) for key in ("terminals", "timeouts")}
    flags["terminals"][last[0]] = flags["timeouts"][last[1]] = True
    return {
        "observations": draw.normal(size=(rows, width)).astype(np.float32),
        "actions": draw.uniform(-1, 1, size=(rows, actions)).astype(np.float32),
        "rewards": draw.normal(size=rows).astype(np.float32),
        **flags,
        FINAL: draw.normal(size=(2, width)).astype(np.float32),
    }


def write_hdf5(path: Path, arrays: dict[str, np.ndarray], **attributes) -> Path:
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array)
        file.attrs.update(attributes)
    return path


def write_minari(arrays, dataset_id: str, monkeypatch, folder: Path, **more) -> None:
    """The same episodes as a Minari data set in `folder`."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    buffers, start = [], 0
    for number, stop in enumerate(np.flatnonzero(arrays["terminals"] | arrays["timeouts"]) + 1):
        seen = np.concatenate([arrays["observations"][start:stop], arrays[FINAL][number][None]])
        buffers.append(
            EpisodeBuffer(
                id=number,
                observations=seen,  # pyright: ignore[reportArgumentType]
                actions=arrays["actions"][start:stop],
                rewards=arrays["rewards"][start:stop],
                terminations=arrays["terminals"][start:stop],
                truncations=arrays["timeouts"][start:stop],
            )
        )
        start = stop
    create_minari(dataset_id, buffers, **more)


@pytest.fixture(autouse=True)
def own_minari_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


def create_minari(dataset_id: str, buffers: list[EpisodeBuffer], **more) -> None:
    minari.create_dataset_from_buffers(
        dataset_id,
        buffers,
        data_format="hdf5",
        author="tests",
        author_email="none",
        code_permalink="none",
        algorithm_name="none",
        **more,
    )


def test_every_format_gives_the_same_transitions(tmp_path, monkeypatch):
    arrays = episodes_as_arrays()
    np.savez(tmp_path / "hopper-mine.npz", **arrays)  # pyright: ignore[reportArgumentType]
    write_minari(arrays, "tests/hopper/mine-v0", monkeypatch, tmp_path / "minari", env="Hopper-v5")
    sources = [
        arrays,
        write_hdf5(tmp_path / "hopper-mine.hdf5", arrays),
        str(write_hdf5(tmp_path / "hopper_mine.h5", arrays)),
        tmp_path / "hopper-mine.npz",
        "tests/hopper/mine-v0",
        tmp_path / "minari" / "tests" / "hopper" / "mine-v0",
    ]
    first, *others = [load_dataset(source) for source in sources]
    for other in others:
        for key, value in vars(first).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, vars(other)[key]), (key, other.source)
        assert torch.equal(first.episode_returns(), other.episode_returns())
    ids = [other.env_id for other in (first, *others)]
    assert ids == [None, "Hopper-v4", "Hopper-v4", "Hopper-v4", "Hopper-v5", "Hopper-v5"]
    names = [other.source for other in (first, *others)]
    assert names == ["arrays", "hdf5", "h5", "npz", "minari", "minari"]


def test_attributes_of_a_file_say_environment_and_references(tmp_path):
    arrays = episodes_as_arrays()
    named = {"env": "Hopper-v5", "ref_min_score": 1.0, "ref_max_score": 2.0}
    dataset = load_dataset(write_hdf5(tmp_path / "walker2d-x.hdf5", arrays, **named))
    assert dataset.env_id == "Hopper-v5"
    assert dataset.reference_returns == (1, 2)
    other = load_dataset(tmp_path / "walker2d-x.hdf5", env_id="Hopper-v4")
    assert other.env_id == "Hopper-v4"


def test_an_attribute_that_is_no_environment_id_is_not_used(tmp_path):
    path = write_hdf5(tmp_path / "door-x.hdf5", episodes_as_arrays(), env="door-v0 (Adroit)")
    dataset = load_dataset(path)
    assert dataset.env_id == "AdroitHandDoor-v1"
    assert dataset.reference_returns == (-56.512833, 2880.5693087298737)


def test_an_unknown_name_has_no_environment(tmp_path):
    dataset = load_dataset(write_hdf5(tmp_path / "mine.hdf5", episodes_as_arrays()))
    assert dataset.env_id is None
    assert dataset.reference_returns is None
    assert "unknown" in summarise(dataset).lines()[1]


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    path = write_hdf5(tmp_path / "hopper.hdf5", episodes_as_arrays())
    assert load_dataset(path).sha256 == download.file_sha256(path)


def test_d4rl_files_without_timeouts_are_cut_at_the_limit_of_the_task(tmp_path):
    """AntMaze umaze: 700 steps. Episodes of 700 (cut), 10 (terminal), 700 (cut), 5 (unfinished)."""
    rows = 700 + 10 + 700 + 5
    arrays = {
        "observations": np.arange(rows, dtype=np.float32).reshape(-1, 1),
        "actions": np.zeros((rows, 8), np.float32),
        "rewards": np.zeros(rows, np.float32),
        "terminals": np.arange(rows) == 709,
    }
    dataset = load_dataset(write_hdf5(tmp_path / "antmaze-umaze-old.hdf5", arrays))
    assert dataset.log.lengths.tolist() == [700, 10, 700, 5]
    assert len(dataset) == rows - 3
    assert "no 'timeouts'" in dataset.notes[0]
    with pytest.raises(InputError, match="missing 'timeouts'"):
        load_dataset(arrays)


def test_a_task_is_read_from_d4rls_folder_and_clipped(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    arrays = episodes_as_arrays()
    arrays["actions"][0, 0] = 1.3
    write_hdf5(tmp_path / find_task("hopper-medium-v2").file_name, arrays)
    dataset = load_dataset("hopper-medium-v2")
    assert (dataset.name, dataset.source) == ("hopper-medium-v2", "d4rl")
    assert dataset.env_id == "Hopper-v4"
    assert dataset.actions.max() == 1
    assert "clipped" in dataset.notes[0]
    with pytest.raises(InputError, match="clip_actions=True"):
        load_dataset(tmp_path / "hopper_medium-v2.hdf5")
    assert load_dataset(tmp_path / "hopper_medium-v2.hdf5", clip_actions=True).actions.max() == 1


def test_the_box_of_the_environment_is_used(tmp_path):
    arrays = episodes_as_arrays(width=3, actions=1)
    arrays["actions"] *= 2
    dataset = load_dataset(arrays, env_id="Pendulum-v1")
    assert dataset.action_high.tolist() == [2]
    np.testing.assert_allclose(dataset.actions.numpy(), arrays["actions"] / 2, atol=1e-6)
    assert dataset.notes[0] == "actions rescaled from [-2, 2] to [-1, 1]"


def test_minari_metadata_gives_references_box_and_unflagged_ends(tmp_path, monkeypatch):
    arrays = episodes_as_arrays(width=3, actions=1)
    write_minari(
        arrays,
        "tests/pendulum/mine-v0",
        monkeypatch,
        tmp_path,
        env="Pendulum-v1",
        ref_min_score=-10.0,
        ref_max_score=0.0,
    )
    dataset = load_dataset("tests/pendulum/mine-v0")
    assert dataset.reference_returns == (-10, 0)
    assert dataset.action_low.tolist() == [-2]
    assert dataset.truncated.tolist() == [False] * 4 + [True]
    assert torch.equal(dataset.next_observations[4], torch.from_numpy(arrays[FINAL][1]))


def dictionary_episodes(space: spaces.Dict, length: int) -> list[EpisodeBuffer]:
    """One episode of random observations without a flag at its end."""
    space.seed(0)
    seen: list[dict] = [space.sample() for _ in range(length + 1)]

    def stacked(keys, values):
        return {
            key: stacked(values[0][key], [value[key] for value in values])
            if isinstance(values[0][key], dict)
            else np.stack([value[key] for value in values])
            for key in keys
        }

    return [
        EpisodeBuffer(
            id=0,
            observations=stacked(space.keys(), seen),
            actions=np.zeros((length, 2), np.float32),  # pyright: ignore[reportArgumentType]
            rewards=[1.0] * length,
            terminations=[False] * length,
            truncations=[False] * length,
        )
    ]


GOALS = spaces.Dict(
    {
        "observation": spaces.Box(-1, 1, (4,), np.float64),
        "goals": spaces.Dict({"b": spaces.Box(-1, 1, (1,)), "a": spaces.Box(-1, 1, (2, 2))}),
        "achieved_goal": spaces.Box(-1, 1, (2,), np.float64),
    }
)


def test_dictionary_observations_are_flattened_as_gymnasium_does():
    create_minari(
        "tests/goals-v0",
        dictionary_episodes(GOALS, 5),
        observation_space=GOALS,
        action_space=spaces.Box(-1, 1, (2,), np.float32),
    )
    dataset = load_dataset("tests/goals-v0")
    GOALS.seed(0)
    rows = [np.asarray(spaces.flatten(GOALS, GOALS.sample())) for _ in range(6)]
    expected = np.stack(rows)
    np.testing.assert_allclose(dataset.observations.numpy(), expected[:-1], rtol=1e-6)
    np.testing.assert_allclose(dataset.next_observations.numpy(), expected[1:], rtol=1e-6)
    assert dataset.truncated.tolist() == [False] * 4 + [True]  # an episode's last row ends it


def test_point_mazes_keep_position_and_velocity_as_their_environment_does():
    create_minari(
        "tests/maze-v0",
        dictionary_episodes(GOALS, 3),
        observation_space=GOALS,
        action_space=spaces.Box(-1, 1, (2,), np.float32),
    )
    dataset = load_dataset("tests/maze-v0", env_id="PointMaze_UMaze-v3")
    GOALS.seed(0)
    expected = np.stack([GOALS.sample()["observation"] for _ in range(3)])
    np.testing.assert_allclose(dataset.observations.numpy(), expected, rtol=1e-6)


def test_discrete_minari_data_is_refused():
    env = gymnasium.make("CartPole-v1")
    buffer = EpisodeBuffer(
        id=0,
        observations=np.zeros((3, 4), np.float32),  # pyright: ignore[reportArgumentType]
        actions=np.zeros(2, np.int64),  # pyright: ignore[reportArgumentType]
        rewards=[1.0, 1.0],
        terminations=[False, True],
        truncations=[False, False],
    )
    create_minari("tests/cart-v0", [buffer], env=env.spec)
    with pytest.raises(InputError, match=r"tests/cart-v0: actions come from Discrete\(2\)"):
        load_dataset("tests/cart-v0")


def broken(folder: Path, kind: str) -> Path:
    """A file that isn't one, for a reason."""
    path = folder / ("hopper.npz" if "npz" in kind else "hopper.hdf5")
    if "empty" in kind:
        path.touch()
    elif "text" in kind:
        path.write_text("<html>403 Forbidden</html>")
    elif kind == "truncated npz":
        np.savez(path, **episodes_as_arrays())  # pyright: ignore[reportArgumentType]
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "pickled npz":
        np.savez(path, observations=np.array([{"code": 1}], dtype=object))
    else:
        write_hdf5(path, episodes_as_arrays((4000, 2000)))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty hdf5", r"hopper\.hdf5: the file is empty"),
        ("text as hdf5", "isn't an HDF5 file .*<html>403"),
        ("truncated hdf5", "truncated or damaged .*get it again"),
        ("empty npz", "is empty"),
        ("text as npz", "isn't a whole npz"),
        ("truncated npz", "isn't a whole npz"),
        ("pickled npz", "isn't a whole npz"),
    ],
)
def test_broken_files_are_refused(kind, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_dataset(broken(tmp_path, kind))


def test_a_damaged_file_of_a_task_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    (tmp_path / "hopper_medium-v2.hdf5").write_text("<html>403</html>")
    with pytest.raises(InputError, match=r"hopper-medium-v2: in .*hopper_medium-v2\.hdf5.*delete"):
        load_dataset("hopper-medium-v2")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hoper-medium-v2", "did you mean hopper-medium-v2"),
        ("nowhere/data.hdf5", "no such file"),
        (Path("nowhere"), "no such file"),
        ("nobody/nothing-v0", "Minari data set can't be downloaded"),
    ],
)
def test_unknown_sources_are_refused(source, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=f"^{source}: .*{message}"):
        load_dataset(source)


def test_other_files_and_folders_are_refused(tmp_path):
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(InputError, match=r"files \.csv can't be read.*\.hdf5, \.h5, \.npz"):
        load_dataset(tmp_path / "data.csv")
    with pytest.raises(InputError, match="holds no Minari data set"):
        load_dataset(tmp_path)


def test_an_unknown_environment_is_refused():
    with pytest.raises(InputError, match="Hoper-v4"):
        load_dataset(episodes_as_arrays(), env_id="Hoper-v4")


REAL_FILES = {
    "rl/door-human.hdf5": (6704, 25, 29.0),
    "rl_rollouts/hopper-medium-replay.hdf5": (200_000, 1291, 14.4),
    "rl_rollouts/halfcheetah-medium-replay.hdf5": (100_000, 100, 17.8),
    "rl_rollouts/hopper-expert.hdf5": (50_000, 55, 102.3),
}


@pytest.mark.parametrize("name", REAL_FILES)
def test_real_files_have_their_published_scores(name):
    if not (REAL / name).exists():
        pytest.skip(f"{name} is not on this machine")
    summary = summarise(load_dataset(REAL / name))
    assert summary.normalised is not None
    found = (summary.transitions, summary.whole_episodes, round(summary.normalised, 1))
    assert found == REAL_FILES[name]
