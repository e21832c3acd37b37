"""Minari data sets as flat arrays, and the environment that they are to be evaluated in."""

import json
from pathlib import Path
from typing import Any

import minari
import numpy as np
from gymnasium import spaces
from minari.dataset.minari_dataset import EpisodeData

from rtb_rl.errors import InputError
from rtb_rl.rl.data.dataset import arrays_sha256
from rtb_rl.rl.data.recording import Recording, references
from rtb_rl.rl.episodes.environment_ids import with_options
from rtb_rl.rl.episodes.environments import flat_keys, registered_options


def minari_directory(path: Path, env_id: str | None) -> Recording:
    """The recording in the directory of a Minari data set; see `minari_recording`."""
    data = path if (path / "metadata.json").exists() else path / "data"
    if not (data / "metadata.json").exists():
        raise InputError(
            "this directory holds no Minari data set (no metadata.json or data/metadata.json); "
            "give the directory of one, or a file"
        )
    return minari_recording(minari.MinariDataset(data), env_id)


def minari_recording(dataset: minari.MinariDataset, env_id: str | None) -> Recording:
    """All episodes of a Minari data set as flat arrays, every next observation known.

    Its environment is the one that it names for evaluation, else the recorded one, with their
    options and limit. `env_id` is the environment that it is to be evaluated in instead.
    """
    metadata = dataset.storage.metadata
    recorded_id = _specified(metadata.get("env_spec"))
    own_id = _specified(metadata.get("eval_env_spec")) or recorded_id
    keys = flat_keys(env_id or own_id or "")
    box = dataset.action_space
    if not isinstance(box, spaces.Box):
        raise InputError(f"actions come from {box}; only continuous actions (Box) are supported")
    try:
        episodes = [_episode(one, dataset.observation_space, keys) for one in dataset]
    except (OSError, KeyError, ValueError, AssertionError) as error:
        raise InputError(f"the Minari data set is damaged ({error}); download it again") from error
    if not episodes:
        raise InputError("the Minari data set holds no episode; collect or download another")
    arrays = {key: np.concatenate([one[key] for one in episodes]) for key in episodes[0]}
    elsewhere = recorded_id not in {None, env_id or own_id}
    return Recording(
        arrays=arrays,
        name=dataset.id,
        source="minari",
        sha256=arrays_sha256(arrays),
        env_id=own_id,
        reference=references(metadata),
        action_box=(box.low, box.high),
        notes=(f"recorded in {recorded_id}",) if elsewhere else (),
    )


def _specified(text: str | None) -> str | None:
    """The id of an environment specification in Gymnasium's JSON, None for none.

    It carries the options and the limit in which the specification differs from what is registered
    under the id.
    """
    if text is None:
        return None
    told = json.loads(text)
    options = {key: value for key, value in told["kwargs"].items() if key != "render_mode"}
    limit = told["max_episode_steps"]
    if limit is not None and limit > 0:
        options["max_episode_steps"] = limit
    registered = registered_options(told["id"])
    differing = {
        key: value
        for key, value in options.items()
        if key not in registered or registered[key] != value
    }
    return with_options(told["id"], differing)


def _episode(
    episode: EpisodeData, space: spaces.Space, keys: tuple[str, ...] | None
) -> dict[str, np.ndarray]:
    """The rows of an episode of T steps and T + 1 observations; its last row always ends it."""
    observations = _vectors(episode.observations, space, keys)
    truncations = np.array(episode.truncations, dtype=bool)
    truncations[-1] |= not episode.terminations[-1]
    return {
        "observations": observations[:-1],
        "actions": np.asarray(episode.actions, np.float32),
        "rewards": np.asarray(episode.rewards, np.float32),
        "terminals": np.asarray(episode.terminations, bool),
        "timeouts": truncations,
        "next_observations": observations[1:],
    }


def _vectors(observations: Any, space: spaces.Space, keys: tuple[str, ...] | None) -> np.ndarray:
    """Observations [T + 1, ...] of a space as float32 [T + 1, d_o]; `keys` of a dictionary only."""
    if isinstance(space, spaces.Dict):
        parts = [(observations[key], space[key]) for key in (keys or space.keys())]
    elif isinstance(space, spaces.Tuple):
        parts = list(zip(observations, space, strict=True))
    elif isinstance(space, spaces.Box):
        return np.asarray(observations, np.float32).reshape(len(observations), -1)
    else:
        raise InputError(f"observations in {space} can't be flattened to numbers; record vectors")
    return np.concatenate([_vectors(part, of, None) for part, of in parts], axis=1)
