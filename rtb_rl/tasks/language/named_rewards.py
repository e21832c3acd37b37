"""Rewards by what is written on a command line."""

import importlib
from typing import Any, cast

from rtb_rl.errors import InputError
from rtb_rl.tasks.language.metrics import words
from rtb_rl.tasks.language.rewards import Contains, TextReward, WordCount
from rtb_rl.tasks.language.settings import TextSettings


def named_reward(settings: TextSettings) -> TextReward | None:
    """The reward that `settings.reward` names; None for `story`, which a language model makes.

    InputError for a name that there is not, and where nothing follows the gap.
    """
    name, _, argument = settings.reward.partition(":")
    if name == "story" and not argument:
        if settings.hidden == settings.sentences:
            raise InputError(
                "the reward `story` is the likelihood of what follows the gap, and nothing follows"
                f" sentence {settings.hidden} of {settings.sentences}; hide an earlier one"
            )
        return None
    if name == "contains" and argument:
        return Contains(tuple(_one_word(part) for part in argument.split(",")))
    if name == "words" and argument.replace(".", "", 1).isdecimal():
        return WordCount(float(argument))
    if "." in name and argument:
        return _imported(name, argument)
    raise InputError(
        f"there is no reward {settings.reward!r}; give story, contains:WORD,WORD, words:NUMBER or"
        " PACKAGE.MODULE:FACTORY"
    )


def _one_word(part: str) -> str:
    found = words(part)
    if len(found) != 1:
        raise InputError(
            f"{part!r} is not one word, so no text contains it; give contains:WORD,WORD"
        )
    return found[0]


def _imported(module: str, factory: str) -> TextReward:
    try:
        made: Any = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise InputError(f"the reward {module}:{factory} can't be imported ({error})") from error
    if not callable(made):
        raise InputError(f"{module}:{factory}() returned {type(made).__name__}, not a function")
    return cast(TextReward, made)
