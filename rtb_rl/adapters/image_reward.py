"""ImageReward (arXiv 2304.05977): its package scores PIL pictures for one prompt at a time.

The package `image-reward` asks for old versions of transformers, and its import fails beside
current ones. So it is no extra of this package: give a model that it loaded, or the name of one
where it can be imported.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from rtb_rl.errors import InputError


@runtime_checkable
class ScoresPictures(Protocol):
    """What `ImageReward.load("ImageReward-v1.0")` returns.

    `score(prompt, pictures)` gives a number for each PIL picture of a list, or the bare number for
    a list of one.
    """

    def score(self, prompt: str, pictures: list[Image.Image], /) -> Any: ...


class ImageRewardScore:
    """log r = the model's score, about -2 to 2.

    Differences are about the log-odds of preference: the model was trained so, then scaled to a
    deviation of 1. Images are rounded to bytes on the way, so no gradient reaches them. The model
    stays on the device that its package put it on.
    """

    differentiable = False

    def __init__(self, model: ScoresPictures):
        self.model = model
        if isinstance(model, nn.Module):
            model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()
    ) -> Tensor:
        if len(prompts) != len(images):
            raise InputError(
                f"{len(images)} images came with {len(prompts)} prompts; give one an image"
            )
        pictures = _pictures(images)
        scores = torch.zeros(len(images))
        for prompt in dict.fromkeys(prompts):
            rows = [row for row, one in enumerate(prompts) if one == prompt]
            found = self.model.score(prompt, [pictures[row] for row in rows])
            values = torch.as_tensor(found, dtype=torch.float32).flatten().cpu()
            if len(values) != len(rows):
                raise InputError(
                    f"the model gave {len(values)} scores for {len(rows)} pictures; give one whose"
                    " score(prompt, pictures) returns a number a picture"
                )
            scores[rows] = values
        return scores.to(images.device)


def image_reward(model: str | Path | ScoresPictures = "ImageReward-v1.0") -> ImageRewardScore:
    """ImageReward as a reward: a model of its package, or the name or the file of one.

    Any object with `score(prompt, pictures)` of that form serves. InputError where the package is
    needed and can't be imported, or doesn't find the model.
    """
    if not isinstance(model, str | Path):
        if not isinstance(model, ScoresPictures):
            raise InputError(
                f"{type(model).__name__} has no score(prompt, pictures); give a model that"
                " ImageReward.load returned, or its name"
            )
        return ImageRewardScore(model)
    try:
        package = importlib.import_module("ImageReward")
    except Exception as error:  # beside a new transformers it fails in many ways
        raise InputError(
            f"ImageReward can't be imported ({_reason(error)}); its package `image-reward` needs"
            " an old transformers. Install both in an environment of their own, or give an object"
            " with score(prompt, pictures), or use pick_score or hps of rtb_rl.adapters.preference"
        ) from error
    try:
        return ImageRewardScore(cast(ScoresPictures, package.load(str(model))))
    except Exception as error:  # the package's own, of any kind
        raise InputError(
            f"ImageReward doesn't load {str(model)!r} ({_reason(error)}); give"
            " 'ImageReward-v1.0' and a network connection, or the path of its ImageReward.pt"
        ) from error


def _pictures(images: Tensor) -> list[Image.Image]:
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8)
    return [Image.fromarray(one.movedim(0, -1).contiguous().numpy()) for one in pixels]


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
