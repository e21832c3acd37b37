"""Gymnasium environments whose observations are the flat float vectors that data sets store.

An environment id is a Gymnasium id (`Hopper-v5`, `AdroitHandDoor-v1`, ...), taken as it is but for
dict observations, which become one vector (`flat_keys`). Or it is D4RL's own name of an ant,
antmaze or kitchen task (`ant-medium-v2`, `antmaze-umaze`, `kitchen-partial-v0`): no Gymnasium id
reproduces those, so their frame, physics and observation are restored here after arXiv 2004.07219
and its code release; see `D4RLAnt`, `D4RLAntMaze` and `D4RLKitchen`. Or, with `ogbench:` in front,
a single task of OGBench, whose return is its success: see `ogbench_environment`.
"""

import contextlib
import difflib
import io
import math
import re
import warnings
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from rtb_rl.errors import InputError
from rtb_rl.rl.catalogue import OGBENCH
from rtb_rl.rl.episodes.ogbench_environment import make_ogbench_environment

ROBOTICS = re.compile(r"(AntMaze|PointMaze|AdroitHand|FrankaKitchen|Fetch|HandReach|HandManip)")
D4RL_ANTMAZE = re.compile(r"antmaze-(umaze|medium|large)(-diverse|-play)?(-v[012])?")
D4RL_ANT = re.compile(r"ant(-(random|medium|expert|(medium|full)-replay|medium-expert))?(-v[012])?")
D4RL_KITCHEN = re.compile(r"kitchen-(complete|partial|mixed)(-v0)?")

# D4RL's evaluation mazes, first row at the smallest y: # wall, R start, G goal.
ANTMAZE_MAPS = {
    "umaze": ("AntMaze_UMaze-v4", "##### #R..# ###.# #G..# #####"),
    "medium": (
        "AntMaze_Medium-v4",
        "######## #R.##..# #..#...# ##...### #..#...# #.#..#.# #...#.G# ########",
    ),
    "large": (
        "AntMaze_Large-v4",
        "############ #R...#.....# #.##.#.#.#.# #......#...# #.####.###.# "
        "#..#.#.....# ##.#.#.#.### #..#...#.G.# ############",
    ),
}
KITCHEN_TASKS = {
    "complete": ("microwave", "kettle", "light switch", "slide cabinet"),
    "partial": ("microwave", "kettle", "light switch", "slide cabinet"),
    "mixed": ("microwave", "kettle", "bottom burner", "light switch"),
}


def make_environment(env_id: str, *, render_mode: str | None = None) -> gymnasium.Env:
    """The environment of that id, with a flat float observation and a bounded continuous action.

    Raises InputError for an unknown id (the nearest ones are named), for a missing extra
    `robotics`, and for observations or actions that are not vectors of floats.
    """
    if env_id.startswith(OGBENCH):
        return make_ogbench_environment(env_id, render_mode)
    if match := D4RL_ANTMAZE.fullmatch(env_id):
        env_name, layout = ANTMAZE_MAPS[match[1]]
        maze_map = [[{"#": 1, ".": 0}.get(c, c.lower()) for c in row] for row in layout.split()]
        env = _make(env_name, render_mode, maze_map=maze_map[::-1])
        return D4RLAntMaze(env)
    if match := D4RL_KITCHEN.fullmatch(env_id):
        tasks = KITCHEN_TASKS[match[1]]
        return D4RLKitchen(_make("FrankaKitchen-v1", render_mode, tasks_to_complete=list(tasks)))
    if D4RL_ANT.fullmatch(env_id):
        return D4RLAnt(_make("Ant-v4", render_mode))
    env = _make(env_id, render_mode)
    if isinstance(env.observation_space, spaces.Dict):
        env = FlatObservation(env, flat_keys(env_id))
    space = env.observation_space
    if not (isinstance(space, spaces.Box) and len(space.shape) == 1):
        raise InputError(
            f"environment {env_id!r} observes {space}, but the package needs one vector of floats; "
            "flatten it in a wrapper and register that under an id of its own"
        )
    action_box(env)
    return env


def _make(env_id: str, render_mode: str | None, **options: Any) -> gymnasium.Env:
    """`gymnasium.make` without its notices about other versions, errors as InputError."""
    if ROBOTICS.match(env_id):
        _import_robotics(env_id)
    if render_mode is not None:
        options["render_mode"] = render_mode
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*Using the latest versioned", UserWarning)
        try:
            return gymnasium.make(env_id, disable_env_checker=True, **options)
        except (gymnasium.error.UnregisteredEnv, gymnasium.error.DependencyNotInstalled) as error:
            raise InputError(_unknown(env_id)) from error
        except (gymnasium.error.Error, ImportError) as error:
            raise InputError(f"{_unknown(env_id)} ({error})") from error


def _unknown(env_id: str) -> str:
    ids = [name for name in gymnasium.registry if not re.search(r"-v[0-3]$", name)]
    versions = [name for name in ids if name.split("-v")[0] == env_id.split("-v")[0]]
    near = versions or difflib.get_close_matches(env_id, ids, n=4, cutoff=0.5)
    names = ", ".join(near) or "none; gymnasium.pprint_registry() lists all"
    return f"environment {env_id!r} is unknown or cannot be made here; nearest ids: {names}"


def _import_robotics(env_id: str) -> None:
    """Register gymnasium-robotics' environments, without the line it prints about Adroit."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import gymnasium_robotics  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"environment {env_id!r} is part of gymnasium-robotics, which is not installed: "
            "pip install 'rtb-rl[robotics]'"
        ) from error
    gymnasium.register_envs(gymnasium_robotics)


def flat_keys(env_id: str) -> tuple[str, ...] | None:
    """Which entries of a dict observation make the vector, in order; None: all, as Gymnasium does.

    Ant mazes: position in front of the body's state, without the goal (29 numbers with `-v4`).
    Point mazes: position and velocity (4). Kitchen: joint positions and velocities (59). The same
    choice must be made for the data.
    """
    if env_id.startswith("AntMaze"):
        return ("achieved_goal", "observation")
    return ("observation",) if env_id.startswith(("PointMaze", "FrankaKitchen")) else None


class FlatObservation(gymnasium.ObservationWrapper):
    """Entries of a dict observation, one after the other."""

    def __init__(self, env: gymnasium.Env, keys: tuple[str, ...] | None):
        super().__init__(env)
        space = env.observation_space
        if keys is not None:
            space = spaces.Dict([(key, space[key]) for key in keys])  # pyright: ignore
        self.keys, self.dict_space = keys, space
        self.observation_space = spaces.flatten_space(space)

    def observation(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        if self.keys is None:
            return spaces.flatten(self.dict_space, observation)  # pyright: ignore
        return np.concatenate([observation[key] for key in self.keys])


class D4RLAntMaze(gymnasium.Wrapper):
    """D4RL's antmaze of the `-v2` tasks (29 numbers, no goal) on gymnasium-robotics' AntMaze.

    What differs there and is put back: the origin is the start cell; rows run towards larger y (by
    a map upside down); the ant moves 0.1 s a step with torques up to 30 (there 0.05 s and 150);
    start noise 0.1; the goal is drawn anew each episode within [0, 1.5] of its cell; coming within
    0.5 of it pays 1 and ends the episode.
    """

    GOAL_RADIUS = 0.5

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.maze: Any = env.unwrapped
        self.maze.position_noise_range = 0.0
        self.maze.ant_env._reset_noise_scale = 0.1
        model = self.maze.ant_env.model
        model.opt.timestep = 0.02
        model.actuator_gear[:, 0] = 30.0
        model.geom_solimp[:, :3] = 0.8, 0.8, 0.01
        self.origin = self.maze.maze.unique_reset_locations[0].copy()
        self.observation_space = spaces.Box(-np.inf, np.inf, (29,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        observation, metrics = self.env.reset(seed=seed, options=options)
        random = self.maze.np_random
        self.maze.goal = self.maze.goal + random.uniform(0, 1, 2) + random.uniform(0, 0.5, 2)
        self.maze.update_target_site_pos()
        return self._flat(observation), metrics

    def step(self, action: Any):
        observation, _, _, truncated, metrics = self.env.step(action)
        distance = np.linalg.norm(observation["achieved_goal"] - self.maze.goal)
        reached = bool(distance <= self.GOAL_RADIUS)
        return self._flat(observation), float(reached), reached, truncated, metrics

    def _flat(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        position = observation["achieved_goal"] - self.origin
        return np.concatenate([position, observation["observation"]])


class D4RLAnt(gymnasium.ObservationWrapper):
    """D4RL's ant: the 27 numbers of Ant-v4 and 84 contact forces that its simulator left at 0."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.observation_space = spaces.Box(-np.inf, np.inf, (111,), np.float64)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return np.concatenate([observation, np.zeros(84)])


class D4RLKitchen(gymnasium.ObservationWrapper):
    """D4RL's kitchen: 9 joint positions, 21 object positions, 30 of the goal (0 outside the tasks).

    FrankaKitchen-v1 observes 59 other numbers: joint and object positions and velocities, no goal.
    Physics and reward (1 for each task when first completed; the last ends the episode) are its.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        from gymnasium_robotics.envs.franka_kitchen import kitchen_env  # pyright: ignore

        kitchen: Any = env.unwrapped
        self.goal = np.zeros(30)
        for task, values in kitchen.goal.items():
            self.goal[kitchen_env.OBS_ELEMENT_INDICES[task]] = values
        self.observation_space = spaces.Box(-np.inf, np.inf, (60,), np.float64)

    def observation(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        joints = observation["observation"]
        return np.concatenate([joints[:9], joints[18:39], self.goal])


def action_box(env: gymnasium.Env) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bound of the actions, float32 [d_a] each; InputError unless finite floats."""
    space = env.action_space
    if not isinstance(space, spaces.Box) or len(space.shape) != 1 or not space.is_bounded():
        name = env.spec.id if env.spec else str(env)
        raise InputError(
            f"environment {name!r} takes actions in {space}, but the package needs a bounded box "
            "of continuous actions"
        )
    return space.low.astype(np.float32), space.high.astype(np.float32)


def check_environment(
    env: gymnasium.Env, observation_size: int, action_size: int, env_id: str, dataset_name: str
) -> None:
    """InputError unless the environment observes and acts in vectors of the data set's sizes."""
    pairs = (
        ("observations", observation_size, env.observation_space.shape),
        ("actions", action_size, env.action_space.shape),
    )
    for what, size, shape in pairs:
        if shape != (size,):
            raise InputError(
                f"{what} of data set {dataset_name!r} have {size} numbers, those of environment "
                f"{env_id!r} have {math.prod(shape or (0,))}; give the environment that the data "
                "was made in with --env-id"
            )
