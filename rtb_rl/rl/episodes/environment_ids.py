"""Ids of environments that carry options: `Pendulum-v1{"g":2.0,"max_episode_steps":50}`.

What stands in braces is the JSON object of what `gymnasium.make` is given beside the id.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from rtb_rl.errors import InputError

LOCOMOTION = re.compile(r"(Hopper|HalfCheetah|Walker2d|Ant|Humanoid|Swimmer)-v\d+")


def split_options(env_id: str) -> tuple[str, dict[str, Any]]:
    """(id without options, options); InputError for options that are no JSON object."""
    plain, brace, rest = env_id.partition("{")
    try:
        return plain, json.loads(brace + rest) if brace else {}
    except ValueError as error:
        raise InputError(
            f"options of environment {env_id!r} are no JSON object ({error}); write them as in"
            """ Pendulum-v1{"g":2.0,"max_episode_steps":50}"""
        ) from None


def with_options(env_id: str, options: Mapping[str, Any]) -> str:
    """The id that carries these options, always in the same spelling; the id itself for none."""
    if not options:
        return env_id
    return env_id + json.dumps(options, sort_keys=True, separators=(",", ":"))


def episode_limit(env_id: str | None) -> int | None:
    """Steps after which this environment, and nothing else, cuts an episode; None where unknown.

    1000 for locomotion unless its options say another. Demonstrations and mazes end when their
    collector chose, so None there.
    """
    plain, options = split_options(env_id or "")
    return options.get("max_episode_steps", 1000) if LOCOMOTION.fullmatch(plain) else None
