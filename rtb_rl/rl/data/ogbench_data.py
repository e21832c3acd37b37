"""Single tasks of OGBench (arXiv 2410.20092): by name, or from a file of its data.

A file holds trajectories without a task: `observations`, `actions`, `terminals` (1 at the last
state of a trajectory, whose action leads nowhere), `qpos`, `qvel` and, with buttons,
`button_states`. In OGBench's compact form `valids` marks the rows that have a successor, and
`terminals` the last of these as well. A task pays -1 (manipulation: -1 for each part not in place)
until it is solved; its rewards and `masks` (0 where solved) are OGBench's own relabelling, or those
in the file. The end of a trajectory is a cut, never an end of the task.

Run with ogbench 1.2.2 on trajectories recorded in its environments; its published files have not
been downloaded.
"""

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rtb_rl.errors import InputError
from rtb_rl.rl.catalogue import OGBENCH
from rtb_rl.rl.data import download
from rtb_rl.rl.data.dataset import arrays_sha256
from rtb_rl.rl.data.recording import Recording
from rtb_rl.rl.episodes.ogbench_environment import import_ogbench, make_ogbench_environment
from rtb_rl.rl.episodes.scores import EpisodeLog

STATE = ("qpos", "button_states")
KEYS = ("valids", "masks", *STATE)
NAME = re.compile(r"ogbench:(.+)-([a-z]+)-singletask((?:-task\d)?)-(v\d+)")
TASK = re.compile(r"(?:ogbench:)?(.+)-singletask((?:-task\d)?)-(v\d+)")
FILE = re.compile(r"(.+)-([a-z]+)-(v\d+)(?:-val)?")
EXAMPLE = "ogbench:antmaze-medium-navigate-singletask-task1-v0"


def is_ogbench(keys: Container[str]) -> bool:
    """Whether a file with these keys is laid out as OGBench's data are."""
    cut = any(key in keys for key in ("timeouts", "truncations", "truncated"))
    marked = "valids" in keys or "masks" in keys or ("qpos" in keys and "rewards" not in keys)
    return "terminals" in keys and marked and not cut


def ogbench_id(env_id: str | None) -> str | None:
    """The id of a single task with `ogbench:` in front; any other as it is."""
    return OGBENCH + env_id.removeprefix(OGBENCH) if env_id and TASK.fullmatch(env_id) else env_id


def task_of_file(stem: str, env_id: str | None) -> str:
    """OGBench's name of the data in a file of this stem with the task of `env_id`; else the stem.

    `antmaze-giant-stitch-v0` with `antmaze-giant-singletask-task2-v0` is
    `ogbench:antmaze-giant-stitch-singletask-task2-v0`.
    """
    file, task = FILE.fullmatch(stem), TASK.fullmatch(env_id or "")
    if not (file and task and file[1] == task[1] and file[3] == task[3]):
        return stem
    return f"{OGBENCH}{file[1]}-{file[2]}-singletask{task[2]}-{file[3]}"


def read_task(name: str, env_id: str | None = None) -> Recording:
    """The data of a single task, `ogbench:` and OGBench's name, downloaded to OGBench's own folder.

    Raises InputError for names that are no single task with vector observations, an `env_id` of
    another task, and a missing extra `ogbench`.
    """
    found = NAME.fullmatch(name)
    if found is None or found[1].startswith(("visual-", "powderworld")):
        raise InputError(
            f"{name!r} is no single task of OGBench with vectors as observations; give a name such"
            f" as {EXAMPLE}"
        )
    own_id = f"{OGBENCH}{found[1]}-singletask{found[3]}-{found[4]}"
    if env_id is not None and env_id.removeprefix(OGBENCH) != own_id.removeprefix(OGBENCH):
        raise InputError(
            f"{name!r} has the rewards of {own_id}, but --env-id is {env_id!r}; leave that out or"
            " name the data of that task"
        )
    import_ogbench(name)
    from ogbench import utils  # pyright: ignore[reportMissingImports]

    file = f"{found[1]}-{found[2]}-{found[4]}.npz"
    folder = Path(utils.DEFAULT_DATASET_DIR).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    path = download.fetch([f"{utils.DATASET_URL}/{file}"], folder / file)
    with np.load(path, allow_pickle=False) as stored:
        wanted = {"observations", "actions", "terminals", *KEYS}
        return read_arrays({key: stored[key] for key in stored if key in wanted}, name, own_id)


def read_arrays(arrays: Mapping[str, Any], name: str, env_id: str | None) -> Recording:
    """The transitions of arrays in OGBench's layout, with the rewards of the task `env_id`.

    A row is terminated where the task is solved, and truncated where its trajectory ends. The log's
    return of a trajectory is 1 where it passes through a solved state, else 0: the unit in which
    OGBench scores. Raises InputError where neither the file nor `env_id` gives rewards.
    """
    rows = _transitions(arrays)
    if "rewards" not in rows or "masks" not in rows:
        _relabel(rows, env_id)
    solved = np.asarray(rows["masks"]).reshape(-1) == 0
    ends = rows["timeouts"]
    kept = ("observations", "actions", "rewards", "timeouts", "next_observations")
    transitions = {key: rows[key] for key in kept} | {"terminals": solved}
    passed = _first_in_trajectory(solved, ends).astype(np.float32)
    return Recording(
        arrays=transitions,
        name=OGBENCH + name.removeprefix(OGBENCH),
        source="ogbench",
        sha256=arrays_sha256(transitions),
        env_id=ogbench_id(env_id),
        reference=(0.0, 1.0),
        action_box=(-1.0, 1.0),
        notes=("returns are the share of trajectories or episodes in which the task is solved",),
        log=EpisodeLog(passed, np.zeros_like(ends), ends),
    )


def _transitions(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Rows that have a successor, with it; `timeouts` marks the last of each trajectory."""
    missing = [key for key in ("observations", "actions", "terminals") if key not in arrays]
    if missing:
        raise InputError(f"missing {', '.join(missing)} of OGBench's layout; get the file again")
    columns = {key: np.asarray(value) for key, value in arrays.items()}
    if len({len(column) for column in columns.values()}) > 1:
        counted = ", ".join(f"{key} {len(column)}" for key, column in columns.items())
        raise InputError(f"arrays differ in length: {counted}; get the file again")
    last = columns.pop("terminals").reshape(-1) != 0
    if "next_observations" in columns:
        return columns | {"timeouts": last}
    if "valids" in columns:
        followed, ends = columns.pop("valids").reshape(-1) != 0, last
    else:
        followed, ends = ~last, np.append(last[1:], True)
    if not followed.any() or followed[-1]:
        raise InputError(
            "the last row must be the end of a trajectory and others must have a successor"
            " ('terminals', 'valids'), as in OGBench's files; get the file again"
        )
    following = columns["observations"][1:][followed[:-1]]
    rows = {key: column[followed] for key, column in columns.items()}
    return rows | {"next_observations": following, "timeouts": ends[followed]}


def _relabel(rows: dict[str, np.ndarray], env_id: str | None) -> None:
    """Add OGBench's rewards and masks of the task."""
    if env_id is None or not TASK.fullmatch(env_id):
        raise InputError(
            f"OGBench's data have no rewards until a task is chosen, but the environment is"
            f" {env_id}; give one such as --env-id ogbench:antmaze-medium-singletask-task1-v0, or"
            f" --dataset {EXAMPLE}"
        )
    name = env_id.removeprefix(OGBENCH)
    environment = make_ogbench_environment(OGBENCH + name)
    try:
        from ogbench.relabel_utils import relabel_dataset  # pyright: ignore[reportMissingImports]

        relabel_dataset(name, environment, rows)
    except (KeyError, IndexError) as error:
        raise InputError(
            f"the rewards of {name} can't be told from this file ({error}): they need "
            f"{' and '.join(STATE)} as that environment has them; give a file of its data"
        ) from error
    finally:
        environment.close()


def _first_in_trajectory(solved: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The first solved row of every trajectory, bool [rows]."""
    count = np.cumsum(solved)
    _, starts, trajectory = np.unique(
        np.cumsum(ends) - ends, return_index=True, return_inverse=True
    )
    return solved & (count - (count - solved)[starts][trajectory] == 1)
