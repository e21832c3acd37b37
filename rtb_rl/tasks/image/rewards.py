"""Ready rewards on images: `(images [batch, channels, height, width] in [0, 1], condition) ->
log r [batch]`, nats.

Any function of that form will do. Those here say by `differentiable` whether gradients reach the
images.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.tasks.image.classifier import Classifier
from rtb_rl.tasks.image.images import to_images


class ImageReward(Protocol):
    """log r of images in [0, 1], nats: [batch]."""

    def __call__(self, images: Tensor, condition: Condition, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class ClassProbability:
    """log p(label | image)."""

    classifier: Classifier
    label: int
    differentiable = True

    def __post_init__(self):
        check_labels(self.classifier, [self.label])

    def __call__(self, images: Tensor, condition: Condition) -> Tensor:
        return _log_probs(self.classifier, images, [self.label]).squeeze(1)


@dataclass(frozen=True, eq=False)
class UnionProbability:
    """log sum_c p(c | image) over the labels: the probability of "any of these"."""

    classifier: Classifier
    labels: Sequence[int]
    differentiable = True

    def __post_init__(self):
        check_labels(self.classifier, self.labels)

    def __call__(self, images: Tensor, condition: Condition) -> Tensor:
        return _log_probs(self.classifier, images, self.labels).logsumexp(1)


@dataclass(frozen=True, eq=False)
class MaxProbability:
    """max_c log p(c | image) over the labels.

    What was published for even and odd digits (arXiv 2405.20971); at most the union, and below it
    where the classifier hesitates between two of the labels.
    """

    classifier: Classifier
    labels: Sequence[int]
    differentiable = True

    def __post_init__(self):
        check_labels(self.classifier, self.labels)

    def __call__(self, images: Tensor, condition: Condition) -> Tensor:
        return _log_probs(self.classifier, images, self.labels).amax(1)


@dataclass(frozen=True, eq=False)
class ConditionalClassProbability:
    """log p(condition | image): the condition is a label a row, int64 [batch]."""

    classifier: Classifier
    differentiable = True

    def __call__(self, images: Tensor, condition: Condition) -> Tensor:
        labels = condition if isinstance(condition, Tensor) else torch.empty(0)
        if labels.shape != (len(images),) or labels.dtype != torch.int64:
            found = f"{labels.dtype} {tuple(labels.shape)}"
            raise InputError(
                f"{len(images)} images came with the condition"
                f" {found if labels is condition else type(condition).__name__}; give one class"
                f" label a row, int64 ({len(images)},)"
            )
        log_probs = self.classifier(images).log_softmax(-1)
        _check_range(labels.unique().tolist(), log_probs.shape[-1])
        return log_probs.gather(1, labels[:, None]).squeeze(1)


@dataclass(frozen=True)
class JpegSize:
    """`scale` times the size of the image's JPEG file, kilobytes of 1,000 bytes.

    With scale below 0 compressibility, above 0 incompressibility (arXiv 2305.13301 section 5.1).
    """

    scale: float
    quality: int = 95
    differentiable = False

    def __call__(self, images: Tensor, condition: Condition) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise InputError(
                f"JPEG files hold 1 or 3 channels, the images have {images.shape[1]}; use another"
                " reward"
            )
        pixels = (images.detach() * 255).round().clamp(0, 255).to("cpu", torch.uint8)
        sizes = [self._kilobytes(image) for image in pixels]
        return self.scale * torch.tensor(sizes, device=images.device)

    def _kilobytes(self, pixels: Tensor) -> float:
        picture = Image.fromarray(pixels.movedim(0, -1).squeeze(-1).numpy())
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=self.quality)
        return file.tell() / 1000


def jpeg_compressibility(*, quality: int = 95, scale: float = 1.0) -> JpegSize:
    """Small files are better, by `scale` nats a kilobyte."""
    return JpegSize(-scale, quality)


def jpeg_incompressibility(*, quality: int = 95, scale: float = 1.0) -> JpegSize:
    """Large files are better, by `scale` nats a kilobyte."""
    return JpegSize(scale, quality)


@dataclass(frozen=True)
class Brightness:
    """`scale` times the mean of all values, which lies in [0, 1]; below 0 for dark images."""

    scale: float = 1.0
    differentiable = True

    def __call__(self, images: Tensor, condition: Condition) -> Tensor:
        return self.scale * images.flatten(1).mean(1)


@dataclass(frozen=True)
class Colour:
    """-`scale` times the squared distance of the mean colour to `target`, a value a channel."""

    target: tuple[float, ...]
    scale: float = 1.0
    differentiable = True

    def __call__(self, images: Tensor, condition: Condition) -> Tensor:
        if images.shape[1] != len(self.target):
            raise InputError(
                f"the target colour has {len(self.target)} values, the images"
                f" {images.shape[1]} channels; give one value a channel"
            )
        mean = images.flatten(2).mean(2)
        return -self.scale * (mean - mean.new_tensor(self.target)).square().sum(1)


@dataclass(frozen=True, eq=False)
class ModelSpaceReward:
    """A reward of images as a LogReward of points of a diffusion, clamped into the valid range."""

    reward: ImageReward

    @property
    def differentiable(self) -> bool:
        """As the reward says; one that says nothing is a black box."""
        return getattr(self.reward, "differentiable", False)

    def __call__(self, x0: Tensor, condition: Condition) -> Tensor:
        return self.reward(to_images(x0), condition)


def in_model_space(reward: ImageReward) -> ModelSpaceReward:
    """log r of x in [-1, 1] for a reward of images in [0, 1]."""
    return ModelSpaceReward(reward)


def check_labels(classifier: Classifier, labels: Sequence[int]) -> None:
    """InputError for labels that the classifier doesn't have, where it says how many it has."""
    if not labels:
        raise InputError("no class to reward; give at least one label")
    classes = getattr(classifier, "classes", None)
    if isinstance(classes, int):
        _check_range(labels, classes)


def _log_probs(classifier: Classifier, images: Tensor, labels: Sequence[int]) -> Tensor:
    """log p(label | image), normalised over all classes: [batch, len(labels)]."""
    log_probs = classifier(images).log_softmax(-1)
    _check_range(labels, log_probs.shape[-1])
    return log_probs[:, list(labels)]


def _check_range(labels: Sequence[int], classes: int) -> None:
    missing = [label for label in labels if not 0 <= label < classes]
    if missing:
        raise InputError(
            f"there is no class {', '.join(map(str, missing))}: the classifier has labels"
            f" 0 to {classes - 1}; choose among these"
        )
