"""Rewards by what is written on a command line."""

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any, cast

from rtb_rl.adapters.image_reward import image_reward
from rtb_rl.adapters.preference import clip_score, hps, laion_aesthetic, pick_score
from rtb_rl.errors import InputError
from rtb_rl.tasks.image.rewards import (
    ImageReward,
    jpeg_compressibility,
    jpeg_incompressibility,
)
from rtb_rl.tasks.text_to_image.colours import ColourScore
from rtb_rl.tasks.text_to_image.outlines import ShapeScore
from rtb_rl.tasks.text_to_image.rewards import PromptReward, without_prompt
from rtb_rl.tasks.text_to_image.shapes import ShapesReward, wanted
from rtb_rl.training.plugins import reward_made_by

STRENGTH = 4.0  # nats between an image of the cell that is asked for and one that has nothing of it


def named_reward(name: str) -> PromptReward:
    """The reward of that name: see TextToImageSettings.reward. InputError for an unknown one.

    Models are loaded here. The current directory is searched after installed packages, so that
    `my_reward:make` finds `my_reward.py` there.
    """
    kind, _, argument = name.partition(":")
    makers: dict[str, Callable[[str], Any]] = {
        "cell": _cell,
        "colour": lambda word: ColourScore(word or None),
        "shape": lambda word: ShapeScore(word or None),
        "compressible": lambda given: _alone(kind, jpeg_compressibility, given),
        "incompressible": lambda given: _alone(kind, jpeg_incompressibility, given),
        "clip": lambda source: _given(clip_score, source),
        "pick-score": lambda source: _given(pick_score, source),
        "hps": lambda source: _given(hps, source),
        "aesthetic": lambda head: laion_aesthetic(head=head) if head else laion_aesthetic(),
        "image-reward": lambda model: _given(image_reward, model),
    }
    if kind in makers:
        return makers[kind](argument)
    if argument and _is_module(kind):
        return cast(PromptReward, reward_made_by(kind, argument))
    raise InputError(
        f"there is no reward {name!r}; give one of {', '.join(makers)}, with what belongs to it"
        " behind a colon, or PACKAGE.MODULE:FACTORY"
    )


def _given(make: Callable[..., Any], argument: str) -> Any:
    return make(argument) if argument else make()


def _alone(kind: str, make: Callable[[], ImageReward], argument: str) -> PromptReward:
    if argument:
        raise InputError(
            f"the reward {kind} takes nothing behind a colon, not {argument!r}; leave it out"
        )
    return without_prompt(make())


def _cell(argument: str) -> ShapesReward:
    words = argument.split()
    if len(words) != 2:
        raise InputError(
            f"the reward cell needs a colour and a shape, not {argument!r}; give for example"
            " 'cell:yellow triangle'"
        )
    return ShapesReward(wanted(words[0], words[1], STRENGTH))


def _is_module(name: str) -> bool:
    """Whether it can only be meant as one, or is one."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    return "." in name or (name.isidentifier() and importlib.util.find_spec(name) is not None)
