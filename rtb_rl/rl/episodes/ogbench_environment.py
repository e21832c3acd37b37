"""OGBench's single tasks as environments whose return is the success of the episode."""

import difflib
import warnings
from typing import Any

import gymnasium
import numpy as np

from rtb_rl.errors import InputError
from rtb_rl.rl.catalogue import OGBENCH


def import_ogbench(wanted: str) -> None:
    """Import `ogbench`, which registers its environments; InputError where it isn't installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its renderer complains where there is no display
            import ogbench  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"{wanted!r} needs the package ogbench, which is not installed ({error}): pip install"
            " 'rtb-rl[ogbench]'"
        ) from error


def make_ogbench_environment(env_id: str, render_mode: str | None = None) -> gymnasium.Env:
    """The single task of this id, `ogbench:` in front.

    Raises InputError for a missing extra `ogbench` and for an unknown or goal-conditioned id.
    """
    import_ogbench(env_id)
    name = env_id.removeprefix(OGBENCH)
    if "singletask" not in name.split("-"):
        raise InputError(
            f"environment {env_id!r} is no single task of OGBench: its goal changes and nothing is"
            " paid; give an id such as ogbench:antmaze-medium-singletask-task1-v0"
        )
    options: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # float64 bounds of float32 boxes
            env = gymnasium.make(name, disable_env_checker=True, **options)
    except gymnasium.error.Error as error:
        ids = [known for known in gymnasium.registry if "-singletask" in known]
        near = ", ".join(difflib.get_close_matches(name, ids, n=3)) or "none"
        raise InputError(f"OGBench has no environment {name!r}; nearest ids: {near}") from error
    return SolvedOnce(env)


class SolvedOnce(gymnasium.Wrapper):
    """Pays 1 at the step that finds the task solved, which ends the episode, and 0 before.

    OGBench itself pays -1 a step (arXiv 2410.20092; single tasks: arXiv 2502.02538) and reports the
    share of episodes solved. Like its relabelled rewards, a step is judged by the state it starts
    from. Mazes draw the noise of the start from NumPy's global generator; here it follows the seed
    of `reset`. (Where a teleporter leads is still drawn from the global one.)
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.task: Any = env.unwrapped
        self.start = np.random.default_rng(0)
        self.solved = False
        if hasattr(self.task, "add_noise"):
            self.task.add_noise = self._near

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        if seed is not None:
            self.start = np.random.default_rng(seed)
        self.solved = False
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any):
        observation, _, terminated, truncated, metrics = self.env.step(action)
        success = bool(metrics["success"])
        reward = float(success and not self.solved)
        self.solved |= success
        return observation, reward, bool(terminated), bool(truncated), metrics

    def _near(self, position: tuple[float, float]) -> tuple[float, float]:
        """A position within a quarter of a cell, times the maze's noise, of this one."""
        reach = self.task._noise * self.task._maze_unit / 4
        x, y = self.start.uniform(-reach, reach, 2)
        return position[0] + x, position[1] + y
