"""Gymnasium environments whose observations are the flat float vectors that data sets store.

An environment id is a Gymnasium id (`Hopper-v5`, `AdroitHandDoor-v1`, ...), taken as it is but for
dict observations, which become one vector (`flat_keys`). Or it is D4RL's own name of a task that no
Gymnasium id reproduces (`antmaze-umaze`, `kitchen-partial-v0`): see `d4rl_environments`. Or, with
`ogbench:` in front, a single task of OGBench, whose return is its success: see
`ogbench_environment`. An id of the first two kinds may carry options: see `environment_ids`.
"""

import contextlib
import difflib
import io
import json
import math
import re
import warnings
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from rtb_rl.errors import InputError
from rtb_rl.rl.catalogue import OGBENCH
from rtb_rl.rl.episodes.d4rl_environments import d4rl_environment
from rtb_rl.rl.episodes.environment_ids import split_options
from rtb_rl.rl.episodes.ogbench_environment import make_ogbench_environment

ROBOTICS = re.compile(r"(AntMaze|PointMaze|AdroitHand|FrankaKitchen|Fetch|HandReach|HandManip)")


def make_environment(env_id: str, *, render_mode: str | None = None) -> gymnasium.Env:
    """The environment of that id, with a flat float observation and a bounded continuous action.

    Raises InputError for an unknown id (the nearest ones are named) or option, for a missing extra
    `robotics`, and for observations or actions that are not vectors of floats.
    """
    if env_id.startswith(OGBENCH):
        return make_ogbench_environment(env_id, render_mode)
    plain, options = split_options(env_id)
    registered, restoring, restored = d4rl_environment(plain) or (plain, {}, None)
    env = _make(registered, render_mode, {**restoring, **options})
    if restored is not None:
        return restored(env)
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


def _make(env_id: str, render_mode: str | None, options: dict[str, Any]) -> gymnasium.Env:
    """`gymnasium.make` without its notices about other versions, errors as InputError."""
    if ROBOTICS.match(env_id):
        _import_robotics(env_id)
    given: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*Using the latest versioned", UserWarning)
        try:
            return gymnasium.make(env_id, disable_env_checker=True, **options, **given)
        except (gymnasium.error.UnregisteredEnv, gymnasium.error.DependencyNotInstalled) as error:
            raise InputError(_unknown(env_id)) from error
        except (gymnasium.error.Error, ImportError) as error:
            raise InputError(f"{_unknown(env_id)} ({error})") from error
        except (TypeError, ValueError, AssertionError, KeyError) as error:
            if not options:
                raise
            raise InputError(
                f"environment {env_id!r} can't be made with options {options}: {error}"
            ) from error


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


def registered_options(env_id: str) -> dict[str, Any]:
    """What an environment is made with where nothing else is said, its limit included.

    As JSON knows it (no tuples). Empty for an id that is not registered here.
    """
    if ROBOTICS.match(env_id):
        with contextlib.suppress(InputError):
            _import_robotics(env_id)
    specification = gymnasium.registry.get(env_id)
    if specification is None:
        return {}
    options = {**specification.kwargs, "max_episode_steps": specification.max_episode_steps}
    return json.loads(json.dumps(options, default=str))


def flat_keys(env_id: str) -> tuple[str, ...] | None:
    """Which entries of a dict observation make the vector, in order; None: all, as Gymnasium does.

    Ant mazes: position in front of the body's state, without the goal (29 numbers with `-v4`).
    Point mazes: position and velocity (4). Kitchen: joint positions and velocities (59). The same
    choice must be made for the data.
    """
    if env_id.startswith("AntMaze"):
        return ("achieved_goal", "observation")
    mazes_and_kitchen = ("PointMaze", "maze2d", "FrankaKitchen")
    return ("observation",) if env_id.startswith(mazes_and_kitchen) else None


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
