"""A film of one episode, drawn without a display."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import imageio.v3 as imageio
import numpy as np
import torch

from rtb_rl.errors import InputError
from rtb_rl.rl.episodes.environments import action_box, make_environment
from rtb_rl.rl.episodes.evaluation import Policy, derived_seed, policy_actions

FRAMES_PER_SECOND = 25


def record_episode(policy: Policy, env_id: str, path: Path | str, *, seed: int) -> float:
    """Write one episode as .gif (or .mp4, with imageio-ffmpeg installed); returns its return.

    The film runs at the environment's own speed. On Linux, MuJoCo draws through EGL unless
    MUJOCO_GL names something else. The seeds are those of `evaluate` with one episode. InputError
    where nothing can draw or write; nothing is written then.
    """
    path = Path(path)
    if path.suffix not in (".gif", ".mp4"):
        raise InputError(f"{path} names a film of type {path.suffix!r}; name a .gif or an .mp4")
    if path.suffix == ".mp4" and not _can_write_mp4():
        raise InputError(f"{path}: an .mp4 needs `pip install 'imageio[ffmpeg]'`; name a .gif")
    with _headless():
        frames, duration, total = _film(policy, env_id, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        imageio.imwrite(path, frames, duration=1000 * duration, loop=0)
    else:
        imageio.imwrite(path, frames, fps=round(1 / duration))
    return total


def _can_write_mp4() -> bool:
    try:
        import imageio_ffmpeg  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def _film(policy: Policy, env_id: str, seed: int) -> tuple[np.ndarray, float, float]:
    """Frames [number, height, width, 3] uint8, seconds between them, and the episode's return."""
    env = _camera(env_id)
    steps_per_second = env.metadata.get("render_fps", FRAMES_PER_SECOND)
    stride = max(1, round(steps_per_second / FRAMES_PER_SECOND))
    box = action_box(env)
    generator = torch.Generator().manual_seed(derived_seed(seed, 1, 0))
    observation, _ = env.reset(seed=derived_seed(seed, 0, 0))
    frames: list[Any] = [env.render()]
    total, step, over = 0.0, 0, False
    while not over:
        action = policy_actions(policy, np.asarray(observation)[None], generator, box)[0]
        observation, reward, terminated, truncated, _ = env.step(action)
        total, step, over = total + float(reward), step + 1, terminated or truncated
        if step % stride == 0 or over:
            frames.append(env.render())
    env.close()
    return np.stack(frames), stride / steps_per_second, total


@contextlib.contextmanager
def _headless() -> Iterator[None]:
    """Let MuJoCo draw through EGL meanwhile, on Linux and unless MUJOCO_GL is set."""
    if sys.platform != "linux" or "MUJOCO_GL" in os.environ:
        yield
        return
    os.environ["MUJOCO_GL"] = "egl"
    try:
        yield
    finally:
        os.environ.pop("MUJOCO_GL", None)


def _camera(env_id: str) -> gymnasium.Env:
    """The environment, reset and able to draw; InputError where it is not."""
    try:
        env = make_environment(env_id, render_mode="rgb_array")
        env.reset(seed=0)
        frame = env.render()
    except InputError:
        raise
    except Exception as error:  # each GL library fails in its own way, some on import
        raise InputError(
            f"cannot draw {env_id!r} ({type(error).__name__}: {error}); install a GL library "
            "(Debian: libegl1, or libosmesa6 with MUJOCO_GL=osmesa)"
        ) from error
    if not isinstance(frame, np.ndarray):
        raise InputError(f"environment {env_id!r} has no render mode 'rgb_array' to film")
    return env
