"""`load_dataset`: D4RL and OGBench files and task names, npz, Minari data sets, arrays."""

import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from gymnasium import spaces
from minari.storage.datasets_root_dir import get_dataset_path

from rtb_rl.errors import InputError
from rtb_rl.rl.catalogue import (
    D4RL_TASKS,
    ENVIRONMENTS,
    OGBENCH,
    environment_of,
    find_task,
)
from rtb_rl.rl.data import download
from rtb_rl.rl.data.dataset import TransitionDataset, arrays_sha256
from rtb_rl.rl.data.minari_data import minari_directory, minari_recording
from rtb_rl.rl.data.ogbench_data import KEYS as OGBENCH_KEYS
from rtb_rl.rl.data.ogbench_data import is_ogbench, ogbench_id, read_arrays, read_task, task_of_file
from rtb_rl.rl.data.recording import Recording, references
from rtb_rl.rl.data.rows import FINAL, KEYS, OTHER_NAMES
from rtb_rl.rl.episodes.environment_ids import episode_limit, split_options, with_options
from rtb_rl.rl.episodes.environments import make_environment

Source = str | Path | Mapping[str, Any]
UNIT_BOX = (-1.0, 1.0)
WANTED = (*KEYS, *OTHER_NAMES, "next_observations", FINAL)


def load_dataset(
    source: Source,
    *,
    env_id: str | None = None,
    action_box: tuple[Any, Any] | None = None,
    clip_actions: bool = False,
) -> TransitionDataset:
    """The data set that `source` names.

    A D4RL task name, or `ogbench:` and the name of a single task (both downloaded once); an .hdf5,
    .h5 or .npz file or a mapping of arrays under the flat D4RL keys, an .npz file in OGBench's
    layout (`env_id`: its task); a Minari id or the directory of a Minari data set.
    `env_id` is the environment to evaluate in, with options or without; when not given, that of the
    file's attributes, or the one that Minari's specification names, or the name stands for.
    `action_box` (low, high) likewise: Minari's, else the environment's. Actions outside it are
    refused unless `clip_actions`; those of D4RL task names and of OGBench are clipped, as their
    environments clip them. Dictionary observations become vectors by `environments.flat_keys`,
    otherwise in the order of gymnasium.spaces.flatten.
    """
    label = "the arrays" if isinstance(source, Mapping) else str(source)
    try:
        env_id = ogbench_id(env_id and with_options(*split_options(env_id)))
        recording = _read(source, env_id)
        by_name = environment_of(recording.name)
        env_id = env_id or recording.env_id or (by_name.env_id if by_name else None)
        differs = (by_name.note,) if by_name and by_name.note and by_name.env_id == env_id else ()
        dataset = TransitionDataset.from_arrays(
            recording.arrays,
            name=recording.name,
            env_id=env_id,
            action_box=action_box or recording.action_box or _environment_box(env_id),
            clip_actions=clip_actions or recording.source in {"d4rl", "ogbench"},
            reference=recording.reference,
            horizon=episode_limit(env_id),
            source=recording.source,
            sha256=recording.sha256,
            notes=recording.notes + differs,
        )
        return dataset if recording.log is None else replace(dataset, log=recording.log)
    except InputError as error:
        raise InputError(f"{label}: {error}") from None


def _read(source: Source, env_id: str | None) -> Recording:
    if isinstance(source, Mapping):
        arrays = dict(source)
        return Recording(arrays, "arrays", "arrays", arrays_sha256(arrays))
    path = Path(source).expanduser()
    name = str(source)
    if path.is_dir():
        return minari_directory(path, env_id)
    if path.exists():
        return _read_file(path, env_id)
    if name.startswith(OGBENCH):
        return read_task(name, env_id)
    if path.suffix in READERS or isinstance(source, Path):
        raise InputError(f"no such file; give the path of one of type {', '.join(READERS)}")
    local = (get_dataset_path(name) / "data").exists()
    if name not in D4RL_TASKS and ("/" in name or local):
        return minari_recording(download.fetch_minari(name), env_id)
    file = download.fetch_task(find_task(name))
    try:
        return replace(_read_file(file), name=name, source="d4rl")
    except InputError as error:
        raise InputError(f"in {file}: {error}; delete it to download it again") from None


def _read_file(path: Path, env_id: str | None = None) -> Recording:
    """The recording in an .hdf5, .h5 or .npz file under the flat D4RL keys, or in OGBench's layout.

    Attributes `env_id` or `env`, `ref_min_score` and `ref_max_score` of an HDF5 file are used.
    """
    if path.suffix not in READERS:
        kind = path.suffix or "without a suffix"
        raise InputError(f"files {kind} can't be read; give one of type {', '.join(READERS)}")
    if not path.stat().st_size:
        raise InputError("the file is empty (0 bytes); get it again")
    arrays, attributes = READERS[path.suffix](path)
    if is_ogbench(arrays):
        return read_arrays(arrays, task_of_file(path.stem, env_id), env_id)
    recorded_id = str(attributes.get("env_id", attributes.get("env", "")))
    return Recording(
        arrays=arrays,
        name=path.stem,
        source=path.suffix.lstrip("."),
        sha256=download.file_sha256(path),
        env_id=recorded_id if re.fullmatch(r"[\w/:-]+-v\d+", recorded_id) else None,
        reference=references(attributes),
        notes=_cut_at_limit(arrays, path.stem),
    )


def _read_hdf5(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not h5py.is_hdf5(path):
        start = path.open("rb").read(16)
        raise InputError(f"this isn't an HDF5 file (it begins with {start!r}); give the data file")
    try:
        with h5py.File(path, "r") as file:
            nodes = {key: file[key] for key in WANTED if key in file}
            arrays = {
                key: node[()] for key, node in nodes.items() if isinstance(node, h5py.Dataset)
            }
            return arrays, dict(file.attrs)
    except (OSError, RuntimeError) as error:
        raise InputError(f"the file is truncated or damaged ({error}); get it again") from None


def _read_npz(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it holds one array, without a name")
        with loaded as file:
            return {key: file[key] for key in (*WANTED, *OGBENCH_KEYS) if key in file}, {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        text = f"this isn't a whole npz file of numbers ({error}); save it again"
        raise InputError(text) from None


READERS = {".hdf5": _read_hdf5, ".h5": _read_hdf5, ".npz": _read_npz}


def _cut_at_limit(arrays: dict[str, Any], name: str) -> tuple[str, ...]:
    """Add the timeouts that a D4RL file without any leaves to be counted; the remark on it.

    D4RL then takes an episode to be cut when it reaches the limit of its environment.
    """
    environment = environment_of(name)
    given = {OTHER_NAMES.get(key, key) for key in arrays}
    if environment is None or "terminals" not in arrays or "timeouts" in given:
        return ()
    ends = np.flatnonzero(np.asarray(arrays["terminals"]).reshape(-1)) + 1
    rows = np.arange(np.size(arrays["terminals"]))
    starts = np.concatenate([[0], ends])[np.searchsorted(ends, rows, side="right")]
    arrays["timeouts"] = (rows - starts + 1) % environment.horizon == 0
    return (f"no 'timeouts': episodes are taken as cut every {environment.horizon} steps (D4RL)",)


def _environment_box(env_id: str | None) -> tuple[Any, Any]:
    """(low, high) of the environment's actions; [-1, 1] for D4RL's environments and none."""
    d4rl = {id for known in ENVIRONMENTS.values() for id in (known.env_id, known.simulator)}
    if env_id is None or env_id in d4rl:
        return UNIT_BOX
    environment = make_environment(env_id)
    space = environment.action_space
    environment.close()
    return (space.low, space.high) if isinstance(space, spaces.Box) else UNIT_BOX
