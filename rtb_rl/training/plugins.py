"""Rewards of a user's own, by the name of what makes them."""

import importlib
from collections.abc import Callable
from typing import Any

from rtb_rl.errors import InputError


def reward_made_by(module: str, factory: str) -> Callable[..., Any]:
    """What the factory of that module returns, called without arguments.

    InputError where it can't be imported, or returns what can't be called.
    """
    try:
        made: Any = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise InputError(f"the reward {module}:{factory} can't be imported ({error})") from error
    if not callable(made):
        raise InputError(f"{module}:{factory}() returned {type(made).__name__}, not a function")
    return made
