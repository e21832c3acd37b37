"""The data sets of a grid: read once before any cell starts, mixtures written as one file."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from rtb_rl.errors import InputError
from rtb_rl.rl import load_dataset
from rtb_rl.rl.catalogue import D4RL_TASKS, OGBENCH, environment_of
from rtb_rl.rl.jobs.opening import check_environment
from rtb_rl.sweep.grid import Grid

FLAGS = ("terminals", "timeouts")
COLUMNS = ("observations", "actions", "rewards", *FLAGS)
NEXT, FINAL = "next_observations", "infos/final_observations"
ATTRIBUTES = ("env", "env_id", "ref_min_score", "ref_max_score")


def data_paths(grid: Grid, root: Path) -> dict[str, str]:
    """What the programs of each task are given as --dataset.

    Files become absolute paths, so that a cell is the same from every working directory; a mixture
    is a file in `root`/data.
    """
    paths = {}
    for task in grid.tasks:
        first, *others = grid.sources(task)
        mixture = root / "data" / f"{task}.hdf5"
        paths[task] = str(mixture) if others else _located(first)
    return paths


def check_data(grid: Grid, paths: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of the data of each task, mixtures being made where they are not there yet.

    InputError for data that can't be read, or that don't fit their environment.
    """
    digests = {}
    for task, path in paths.items():
        sources = [_located(source) for source in grid.sources(task)]
        try:
            if len(sources) > 1:
                mix(sources, Path(path))
            digests[task] = _check(path, grid, task)
        except (InputError, OSError) as error:
            raise InputError(f"task {task}: {error}") from error
    return digests


def origin_of(dataset: str) -> str:
    """Where data come from, by what --dataset was given: d4rl, ogbench, minari, local or file."""
    if Path(dataset).suffix in {".hdf5", ".h5", ".npz"} or Path(dataset).exists():
        return "file"
    if dataset in D4RL_TASKS:
        return "d4rl"
    if dataset.startswith(OGBENCH):
        return "ogbench"
    return "local" if dataset.startswith("local/") else "minari"


def _located(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _check(dataset: str, grid: Grid, task: str) -> str:
    """SHA-256 of the data, which are those that every agent would train on.

    InputError where agents would be evaluated in different environments: no table has both.
    """
    digest = ""
    seen: list[dict[str, Any]] = []
    environments: dict[str, str | None] = {}
    for agent in grid.agents:
        overrides = grid.overrides(task, agent)
        options = {key: overrides[key] for key in ("env_id", "clip_actions") if key in overrides}
        if options in seen:
            continue
        seen.append(options)
        loaded = load_dataset(dataset, **options)
        check_environment(loaded)
        digest, environments[agent] = loaded.sha256, loaded.env_id
    if len(set(environments.values())) > 1:
        (one, here), (other, there) = _first_two(environments)
        raise InputError(
            f"{one} is evaluated in {here} and {other} in {there}; give env_id once, for the task"
        )
    return digest


def mix(sources: Sequence[str], path: Path) -> Path:
    """`path`, one HDF5 file with the rows of these files in order; written once, stable bytes.

    D4RL's keys are kept: next_observations and infos/final_observations where every file has them.
    No episode goes on from one file into the next: a last row that ends none is marked as cut.
    InputError for files that don't belong together, or where `path` was made of others.
    """
    digests = [_digest(Path(source)) for source in sources]
    parts = json.dumps([[Path(s).name, d] for s, d in zip(sources, digests, strict=True)])
    if path.exists():
        with h5py.File(path, "r") as file:
            made_of = str(file.attrs.get("mixture_of", ""))
        if made_of != parts:
            raise InputError(
                f"{path} was made of {made_of or 'unknown files'}, and the grid asks for {parts}; "
                "give another --out or take the old files back"
            )
        return path
    for source, digest in zip(sources, digests, strict=True):
        if digests.count(digest) > 1:
            raise InputError(f"the mixture holds {source} twice; name each file once")
    files = {source: _read(source) for source in sources}
    _check_environments(files)
    arrays = {key: _joined(files, key) for key in _shared_keys(files)}
    attributes = _shared_attributes(files)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with h5py.File(partial, "w") as file:
        file.attrs.update({**attributes, "mixture_of": parts})
        for key, array in arrays.items():
            file.create_dataset(key, data=array)
    os.replace(partial, path)
    return path


def _digest(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"there is no file {path}; a mixture is made of HDF5 files")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(source: str) -> dict[str, Any]:
    """Arrays and attributes of one file, its last row ending an episode."""
    try:
        with h5py.File(source, "r") as file:
            missing = [key for key in COLUMNS if key not in file]
            if missing:
                raise InputError(
                    f"{source} has no {', '.join(missing)}; files of a mixture need "
                    f"{', '.join(COLUMNS)}"
                )
            content: dict[str, Any] = {
                key: np.asarray(file[key]) for key in (*COLUMNS, NEXT, FINAL) if key in file
            }
            content |= {key: file.attrs[key] for key in ATTRIBUTES if key in file.attrs}
    except (OSError, RuntimeError) as error:
        raise InputError(f"{source} is no whole HDF5 file ({error}); get it again") from error
    for key in FLAGS:
        content[key] = content[key].astype(bool).reshape(-1)
    ends = content["terminals"] | content["timeouts"]
    if not len(ends):
        raise InputError(f"{source} has no rows; leave it out of the mixture")
    content["timeouts"][-1] |= not ends[-1]
    episodes = int(ends.sum()) + (not ends[-1])
    if FINAL in content and len(content[FINAL]) != episodes:
        raise InputError(
            f"{source} has {len(content[FINAL])} rows of {FINAL} for {episodes} episodes; cut it "
            "to whole episodes or leave that key out"
        )
    return content


def _shared_keys(files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        *COLUMNS,
        *(key for key in (NEXT, FINAL) if all(key in content for content in files.values())),
    ]


def _joined(files: Mapping[str, Mapping[str, Any]], key: str) -> np.ndarray:
    shapes = {source: content[key].shape[1:] for source, content in files.items()}
    if len(set(shapes.values())) > 1:
        (one, shape), (other, another) = _first_two(shapes)
        raise InputError(
            f"rows of {key} are {shape} in {one} and {another} in {other}; mix files of one "
            "environment"
        )
    return np.concatenate([content[key] for content in files.values()])


def _shared_attributes(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    shared = {}
    for key in ATTRIBUTES:
        values = {source: content.get(key) for source, content in files.items()}
        if len(set(values.values())) > 1:
            (one, value), (other, another) = _first_two(values)
            raise InputError(
                f"{key} is {value} in {one} and {another} in {other}; mix files of one environment"
            )
        if (value := next(iter(values.values()))) is not None:
            shared[key] = value
    return shared


def _check_environments(files: Mapping[str, Mapping[str, Any]]) -> None:
    """InputError for files of D4RL tasks of different environments: these don't say which it is,
    and rows of HalfCheetah and Walker2d have the same shapes.
    """
    silent = [s for s, content in files.items() if not content.get("env", content.get("env_id"))]
    known = {s: found.env_id for s in silent if (found := environment_of(Path(s).stem))}
    if len(set(known.values())) > 1:
        (one, here), (other, there) = _first_two(known)
        raise InputError(f"{one} is of {here} and {other} of {there}; mix files of one environment")


def _first_two(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The first item, and the first whose value differs from it."""
    (source, value), *rest = values.items()
    return [(source, value), next(item for item in rest if item[1] != value)]
