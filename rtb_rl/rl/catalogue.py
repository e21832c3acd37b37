"""The D4RL tasks: where each data set lies, and the maintained environment it is evaluated in.

D4RL (arXiv 2004.07219) recorded its locomotion data in gym `*-v2` on mujoco-py. The nearest
maintained environments are Gymnasium's `*-v4`: same model files and rewards, new bindings (in
`*-v5` Walker2d's feet have other friction). Maze, kitchen and hand tasks run on gymnasium-robotics.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

from rtb_rl.errors import InputError

SERVERS = (
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/{name}",
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/{path}",
)
"""Where the files are: a mirror that keeps all of them in one folder, and D4RL's own server."""

OGBENCH = "ogbench:"
"""What names of OGBench's data sets and environments begin with (arXiv 2410.20092): it has an
antmaze of its own. Gymnasium reads such an id as one to be found by importing `ogbench`."""


@dataclass(frozen=True)
class D4RLEnvironment:
    """One environment of D4RL.

    `env_id` is what `environments.make_environment` evaluates in (a Gymnasium id, or D4RL's name of
    a task that has to be restored), `simulator` the registered id underneath, `horizon` D4RL's
    limit in steps; `note` says how recorded observations differ from it.
    """

    env_id: str
    horizon: int
    simulator: str
    note: str = ""


@dataclass(frozen=True)
class D4RLTask:
    """One data set of D4RL: its name, its file on D4RL's server, and its environment."""

    name: str
    path: str
    environment: D4RLEnvironment

    @property
    def file_name(self) -> str:
        """Name of the file, also in D4RL's own cache."""
        return PurePosixPath(self.path).name

    @property
    def urls(self) -> tuple[str, ...]:
        """Addresses to try, in order."""
        return tuple(server.format(name=self.file_name, path=self.path) for server in SERVERS)

    @property
    def env_id(self) -> str:
        """Gymnasium id to evaluate in."""
        return self.environment.env_id

    @property
    def horizon(self) -> int:
        """Longest episode, in steps."""
        return self.environment.horizon


def _gymnasium(env_id: str, horizon: int, note: str = "") -> D4RLEnvironment:
    return D4RLEnvironment(env_id, horizon, simulator=env_id, note=note)


def _kitchen(level: str) -> D4RLEnvironment:
    note = "recorded: 60 numbers (joints, objects, goal); FrankaKitchen-v1 observes a dictionary"
    return D4RLEnvironment(f"kitchen-{level}-v0", 280, "FrankaKitchen-v1", note)


def _ant_maze(size: str, horizon: int) -> D4RLEnvironment:
    note = "recorded: x, y and the 27 numbers of the body, without the goal"
    simulator = f"AntMaze_{'UMaze' if size == 'umaze' else size.title()}-v4"
    return D4RLEnvironment(f"antmaze-{size}-v2", horizon, simulator, note)


def _maze2d(size: str, horizon: int) -> D4RLEnvironment:
    note = "PointMaze has another frame, start and goal than maze2d: scores are not D4RL's"
    return _gymnasium(f"PointMaze_{size}-v3", horizon, note)


def _open_maze(kind: str) -> D4RLEnvironment:
    maze = _maze2d(f"Open{kind}", 150)  # registered with 300 steps
    return replace(maze, env_id="maze2d-open-dense" if kind else "maze2d-open")


ENVIRONMENTS: Mapping[str, D4RLEnvironment] = MappingProxyType(
    {
        "halfcheetah": _gymnasium("HalfCheetah-v4", 1000),
        "hopper": _gymnasium("Hopper-v4", 1000),
        "walker2d": _gymnasium("Walker2d-v4", 1000),
        "ant": D4RLEnvironment(
            "ant", 1000, "Ant-v4", "recorded: 27 numbers and 84 contact forces that are all zero"
        ),
        "antmaze-umaze": _ant_maze("umaze", 700),
        "antmaze-medium": _ant_maze("medium", 1000),
        "antmaze-large": _ant_maze("large", 1000),
        "kitchen-complete": _kitchen("complete"),
        "kitchen-partial": _kitchen("partial"),
        "kitchen-mixed": _kitchen("mixed"),
        "pen": D4RLEnvironment("pen", 100, "AdroitHandPen-v1"),
        "hammer": _gymnasium("AdroitHandHammer-v1", 200),
        "relocate": _gymnasium("AdroitHandRelocate-v1", 200),
        "door": _gymnasium("AdroitHandDoor-v1", 200),
        "maze2d-open": _open_maze(""),
        "maze2d-umaze": _maze2d("UMaze", 300),
        "maze2d-medium": _maze2d("Medium", 600),
        "maze2d-large": _maze2d("Large", 800),
        "maze2d-open-dense": _open_maze("Dense"),
        "maze2d-umaze-dense": _maze2d("UMazeDense", 300),
        "maze2d-medium-dense": _maze2d("MediumDense", 600),
        "maze2d-large-dense": _maze2d("LargeDense", 800),
    }
)
"""Environments by the name their tasks begin with; every action box is [-1, 1]."""


def _locomotion_files() -> Iterator[tuple[str, str]]:
    levels = ("random", "medium", "expert", "medium-replay", "medium-expert", "full-replay")
    for body in ("halfcheetah", "hopper", "walker2d", "ant"):
        for level in levels:
            stem = f"{body}_{level.replace('-', '_')}"
            for version in ("v1", "v2"):
                yield f"{body}-{level}-{version}", f"gym_mujoco_{version}/{stem}-{version}.hdf5"
            if level == "medium-replay":
                stem = f"{body.removesuffix('2d')}_mixed"
            if level != "full-replay":
                yield f"{body}-{level}-v0", f"gym_mujoco/{stem}.hdf5"


def _ant_maze_files() -> Iterator[tuple[str, str]]:
    mazes = {
        "umaze": ("u-maze", "False", "False"),
        "umaze-diverse": ("u-maze", "True", "True"),
        "medium-play": ("big-maze", "True", "False"),
        "medium-diverse": ("big-maze", "True", "True"),
        "large-play": ("hardest-maze", "True", "False"),
        "large-diverse": ("hardest-maze", "True", "True"),
    }
    for name, (maze, starts, goals) in mazes.items():
        stem = f"Ant_maze_{maze}_noisy_multistart_{starts}_multigoal_{goals}_sparse"
        yield f"antmaze-{name}-v0", f"ant_maze_new/{stem}.hdf5"
        yield f"antmaze-{name}-v2", f"ant_maze_v2/{stem}_fixed.hdf5"


def _kitchen_files() -> Iterator[tuple[str, str]]:
    kitchen = "kitchen_microwave_kettle_"
    yield "kitchen-complete-v0", f"kitchen/mini_{kitchen}light_slider-v0.hdf5"
    yield "kitchen-partial-v0", f"kitchen/{kitchen}light_slider-v0.hdf5"
    yield "kitchen-mixed-v0", f"kitchen/{kitchen}bottomburner_light-v0.hdf5"


def _hand_files() -> Iterator[tuple[str, str]]:
    for hand in ("pen", "hammer", "relocate", "door"):
        for level in ("human", "cloned", "expert"):
            yield f"{hand}-{level}-v1", f"hand_dapg_v1/{hand}-{level}-v1.hdf5"
        yield f"{hand}-human-v0", f"hand_dapg/{hand}-v0_demos_clipped.hdf5"
        yield f"{hand}-cloned-v0", f"hand_dapg/{hand}-demos-v0-bc-combined.hdf5"
        yield f"{hand}-expert-v0", f"hand_dapg/{hand}-v0_expert_clipped.hdf5"


def _maze2d_files() -> Iterator[tuple[str, str]]:
    yield "maze2d-open-v0", "maze2d/maze2d-open-sparse.hdf5"
    yield "maze2d-open-dense-v0", "maze2d/maze2d-open-dense.hdf5"
    for size in ("umaze", "medium", "large"):
        yield f"maze2d-{size}-v1", f"maze2d/maze2d-{size}-sparse-v1.hdf5"
        yield f"maze2d-{size}-dense-v1", f"maze2d/maze2d-{size}-dense-v1.hdf5"


def longest_prefix(name: str, keys: Mapping[str, Any]) -> str | None:
    """The longest key that `name` begins with, up to a dash or the end.

    Case doesn't matter and an underscore is a dash: `hopper-medium-v2`, `hopper_medium_replay` and
    `Hopper-v4` all find the key `hopper`.
    """
    plain = name.lower().replace("_", "-").replace("ant-maze", "antmaze")
    found = [key for key in keys if plain == key or plain.startswith(key + "-")]
    return max(found, key=len, default=None)


def _tasks() -> dict[str, D4RLTask]:
    tasks = {}
    for files in (_locomotion_files, _ant_maze_files, _kitchen_files, _hand_files, _maze2d_files):
        for name, path in files():
            key = longest_prefix(name, ENVIRONMENTS)
            if key is None:
                raise ValueError(f"task {name} has no environment")
            tasks[name] = D4RLTask(name, path, ENVIRONMENTS[key])
    return tasks


D4RL_TASKS: Mapping[str, D4RLTask] = MappingProxyType(_tasks())
"""Every data set by its D4RL name."""


def find_task(name: str) -> D4RLTask:
    """The D4RL task of this name; an unknown one is an InputError with the nearest names."""
    if name in D4RL_TASKS:
        return D4RL_TASKS[name]
    near = difflib.get_close_matches(name.lower(), D4RL_TASKS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "these look like hopper-medium-v2."
    raise InputError(
        f"{name!r} is neither a file, nor a Minari data set on this machine, nor one of the "
        f"{len(D4RL_TASKS)} D4RL tasks: {hint}"
    )


def environment_of(name: str) -> D4RLEnvironment | None:
    """The D4RL environment that a task name or the stem of a file points to, if any."""
    for task in D4RL_TASKS.values():
        if name == PurePosixPath(task.path).stem:
            return task.environment
    key = longest_prefix(name, ENVIRONMENTS)
    return None if key is None else ENVIRONMENTS[key]


def task_of_stem(stem: str) -> str:
    """The D4RL task whose file has this stem, `hopper-medium-v2` of `hopper_medium-v2`; else it."""
    names = (t.name for t in D4RL_TASKS.values() if stem == PurePosixPath(t.path).stem)
    return next(names, stem)
