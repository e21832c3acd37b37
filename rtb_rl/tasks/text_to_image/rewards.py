"""Rewards on images that belong to prompts: the form they have, and the checks on what they say.

    reward(images, prompts, metadata) -> rewards, or (rewards, info)

images: float [n, 3, height, width] in [0, 1]; prompts: n texts; metadata: n dicts of whatever the
prompts came with; rewards: n numbers as a tensor, an array or a list. A plain function will do.

The numbers are log r in nats, before the inverse temperature beta: the posterior is
p(image | prompt) r^beta / Z(prompt). beta is a setting of the training and of nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rtb_rl.errors import InputError, NonFiniteError
from rtb_rl.tasks.image.rewards import ImageReward

Metadata = Mapping[str, Any]


class PromptReward(Protocol):
    """log r of images in [0, 1] for their prompts, nats: n numbers, or those and an `info`.

    One with an attribute `differentiable` that is true lets gradients reach the images; one that
    says nothing is a black box.
    """

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], /
    ) -> object: ...


def is_differentiable(reward: object) -> bool:
    """As the reward says; one that says nothing is a black box."""
    return bool(getattr(reward, "differentiable", False))


@dataclass(frozen=True, eq=False)
class CheckedReward:
    """(log r [n], info) of any PromptReward, on the device of the images, float32 or better.

    A black box is called without gradient. Minus infinity is let through: r is zero there.
    InputError for a count that is not that of the images, for anything that isn't numbers, and for
    a reward that says it is differentiable and loses the gradient. NonFiniteError for NaN and
    +infinity, with the prompt of the first such image.
    """

    reward: PromptReward

    @property
    def differentiable(self) -> bool:
        return is_differentiable(self.reward)

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        count = len(images)
        details = list[Metadata](metadata or [{} for _ in range(count)])
        _check_given(images, prompts, details)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
            returned = self.reward(images, list(prompts), details)
            rewards, info = _split(returned)
            log_r = _numbers(rewards, images)
        if log_r.shape != (count,):
            raise InputError(
                f"the reward returned {_amount(log_r)} for {_counted(count, 'image')}; return one"
                f" number an image, of shape ({count},)"
            )
        self._check_gradient(images, log_r)
        _check_finite(log_r.detach(), prompts)
        return log_r, info

    def _check_gradient(self, images: Tensor, log_r: Tensor) -> None:
        wanted = self.differentiable and torch.is_grad_enabled() and images.requires_grad
        if wanted and not log_r.requires_grad:
            raise InputError(
                "the reward says that it is differentiable, but its numbers carry no gradient;"
                " compute them in torch throughout (PIL, NumPy, item() and detach() lose it), or"
                " set differentiable to False"
            )


@dataclass(frozen=True, eq=False)
class WithoutPrompt:
    """A reward of images alone, as a reward of images and prompts."""

    reward: ImageReward

    @property
    def differentiable(self) -> bool:
        return is_differentiable(self.reward)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        return self.reward(images, None)


def without_prompt(reward: ImageReward) -> WithoutPrompt:
    """`reward(images, condition)` as a PromptReward; the condition is None.

    So the rewards of tasks/image serve here: `without_prompt(jpeg_compressibility())`.
    """
    return WithoutPrompt(reward)


def _check_given(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(
            f"images are {images.dtype} {tuple(images.shape)}; give float values in [0, 1],"
            " [n, 3, height, width]"
        )
    if isinstance(prompts, str) or len(prompts) != len(images) or len(metadata) != len(images):
        found = "one text" if isinstance(prompts, str) else _counted(len(prompts), "prompt")
        raise InputError(
            f"{_counted(len(images), 'image')} came with {found} and {len(metadata)} of metadata;"
            " give a list with one of each an image"
        )


def _split(returned: object) -> tuple[object, dict[str, Any]]:
    """Rewards and info; a pair of numbers is the rewards of two images."""
    if isinstance(returned, tuple) and len(returned) == 2:
        rewards, info = returned
        if info is None or isinstance(info, Mapping):
            return rewards, dict(info or {})
    return returned, {}


def _numbers(rewards: Any, images: Tensor) -> Tensor:
    """Rewards as a tensor beside the images, of any shape."""
    precision = torch.promote_types(images.dtype, torch.float32)
    listed = isinstance(rewards, list | tuple) and len(rewards) > 0
    try:
        if listed and all(isinstance(one, Tensor) for one in rewards):
            rewards = torch.stack(list(rewards))
        found = torch.as_tensor(rewards)
        if found.is_complex():
            raise TypeError("complex numbers")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"the reward returned {type(rewards).__name__}, which can't be read as numbers"
            f" ({error}); return a tensor, an array or a list of numbers"
        ) from error
    return found.to(images.device, precision)


def _check_finite(log_r: Tensor, prompts: Sequence[str]) -> None:
    bad = (log_r.isnan() | (log_r == torch.inf)).nonzero().flatten().tolist()
    if bad:
        first = bad[0]
        raise NonFiniteError(
            f"the reward of image {first} of {len(log_r)} is {float(log_r[first])}, for the prompt"
            f" {prompts[first]!r} ({_counted(len(bad), 'such image')}); log r may be minus"
            " infinity, but not NaN or infinity"
        )


def _amount(found: Tensor) -> str:
    if found.ndim < 2:
        return _counted(found.numel(), "value")
    return f"values of shape {tuple(found.shape)}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
