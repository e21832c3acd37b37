"""Rewards by what is written on a command line."""

from typing import cast

from rtb_rl.errors import InputError
from rtb_rl.tasks.language.metrics import words
from rtb_rl.tasks.language.rewards import Contains, TextReward, WordCount
from rtb_rl.tasks.language.settings import TextSettings
from rtb_rl.training.plugins import reward_made_by


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
        return cast(TextReward, reward_made_by(name, argument))
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
