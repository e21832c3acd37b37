"""Inverse problems: y = A x + sigma eps of images in model space [-1, 1], A linear.

An operator is A alone: `apply`, its transpose `adjoint`, and `as_image`, the observation as
channels of the image's size for a conditional network. A Measurement adds the noise.
"""

import hashlib
import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor
from torch.nn import functional

from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError

OBSERVATION = "observation"


class Operator(Protocol):
    """A linear map of images [batch, channels, height, width]."""

    def apply(self, x: Tensor) -> Tensor:
        """A x: [batch, *observation]."""
        ...

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y: [batch, channels, height, width]."""
        ...

    def as_image(self, y: Tensor) -> Tensor:
        """What y shows of the image, at its size: [batch, hints, height, width]."""
        ...


@dataclass(frozen=True, eq=False)
class Inpainting:
    """The visible pixels only, in every channel: [batch, channels, visible].

    `mask`: bool [height, width], True where visible.
    """

    mask: Tensor

    def __post_init__(self):
        if self.mask.dtype != torch.bool or self.mask.ndim != 2 or not bool(self.mask.any()):
            raise InputError(
                f"a mask must be bool [height, width] with a visible pixel, not {self.mask.dtype}"
                f" {tuple(self.mask.shape)} with {int(self.mask.count_nonzero())}"
            )

    def apply(self, x: Tensor) -> Tensor:
        if x.shape[2:] != self.mask.shape:
            raise InputError(
                f"the mask is {tuple(self.mask.shape)}, the images are {tuple(x.shape[2:])}; give"
                " a mask of their size"
            )
        return x[:, :, self.mask.to(x.device)]

    def adjoint(self, y: Tensor) -> Tensor:
        image = y.new_zeros(*y.shape[:2], *self.mask.shape)
        image[:, :, self.mask.to(y.device)] = y
        return image

    def as_image(self, y: Tensor) -> Tensor:
        """The image, zero where hidden, and the mask as one more channel."""
        mask = self.mask.to(y).expand(len(y), 1, *self.mask.shape)
        return torch.cat([self.adjoint(y), mask], 1)


@dataclass(frozen=True)
class SuperResolution:
    """Means of squares of `factor` x `factor` pixels."""

    factor: int = 2

    def __post_init__(self):
        if self.factor < 1:
            raise InputError(f"squares of {self.factor} pixels have no mean; give 1 or more")

    def apply(self, x: Tensor) -> Tensor:
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise InputError(
                f"images of {x.shape[2]} x {x.shape[3]} can't be divided into squares of"
                f" {self.factor} pixels; use a factor of both sides"
            )
        return functional.avg_pool2d(x, self.factor)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.as_image(y) / self.factor**2

    def as_image(self, y: Tensor) -> Tensor:
        """Each mean on all pixels of its square."""
        return y.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)


@dataclass(frozen=True)
class GaussianBlur:
    """Each channel convolved with a Gaussian of standard deviation `width`, pixels.

    The kernel has `size` x `size` pixels and sum one; the image continues as zeros, mid-grey.
    Symmetric, so that A^T = A.
    """

    width: float = 1.0
    size: int = 5

    def __post_init__(self):
        if not self.width > 0 or self.size < 1 or self.size % 2 == 0:
            raise InputError(
                f"a blur needs a width above 0 and an odd size, not {self.width} and {self.size}"
            )

    def apply(self, x: Tensor) -> Tensor:
        place = torch.arange(self.size, dtype=x.dtype, device=x.device) - self.size // 2
        row = (-(place / self.width).square() / 2).softmax(0)
        kernel = torch.outer(row, row).expand(x.shape[1], 1, -1, -1)
        return functional.conv2d(x, kernel, padding=self.size // 2, groups=x.shape[1])

    def adjoint(self, y: Tensor) -> Tensor:
        return self.apply(y)

    def as_image(self, y: Tensor) -> Tensor:
        """The blurred image."""
        return y


@dataclass(frozen=True, eq=False)
class Measurement:
    """y = A x + sigma eps, eps ~ N(0, I), of x in model space."""

    operator: Operator
    sigma: float

    def __post_init__(self):
        if not self.sigma > 0:
            raise InputError(
                f"sigma is {self.sigma}: without noise there is no likelihood; give one above 0"
            )

    def apply(self, x: Tensor) -> Tensor:
        """A x."""
        return self.operator.apply(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y."""
        return self.operator.adjoint(y)

    def as_image(self, y: Tensor) -> Tensor:
        """What y shows of the image, at its size: [batch, hints, height, width]."""
        return self.operator.as_image(y)

    def observe(self, x: Tensor, *, generator: Generator) -> Tensor:
        """A draw of y given x: [batch, *observation]."""
        y = self.apply(x)
        eps = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
        return y + self.sigma * eps

    def log_likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        """log N(y; A x, sigma^2 I), nats: [batch]. InputError for y of another shape."""
        mean = self.apply(x)
        if y.shape != mean.shape:
            raise InputError(
                f"the observation is {tuple(y.shape)}, of these images it would be"
                f" {tuple(mean.shape)}; give one observation a row, made by the same operator"
            )
        terms = ((y - mean) / self.sigma).square() / 2 + math.log(self.sigma * math.tau**0.5)
        return -terms.flatten(1).sum(1)

    def maximum(self, y: Tensor) -> float:
        """log N(y; A x, sigma^2 I) where A x = y, nats: the largest that there can be."""
        return -math.log(self.sigma * math.tau**0.5) * math.prod(y.shape[1:])


@dataclass(frozen=True, eq=False)
class MeasurementReward:
    """log p(y | x0), nats, of the condition {"observation": y}."""

    measurement: Measurement
    differentiable = True

    def __call__(self, x0: Tensor, condition: Condition) -> Tensor:
        return self.measurement.log_likelihood(x0, self._observation(condition))

    def maximum(self, condition: Condition) -> float:
        """The largest log p(y | x0) that any x0 could have, nats: see `normalised_step`."""
        return self.measurement.maximum(self._observation(condition))

    @staticmethod
    def _observation(condition: Condition) -> Tensor:
        if not isinstance(condition, dict) or OBSERVATION not in condition:
            raise InputError(
                "a measurement needs the condition {'observation': y}, not"
                f" {sorted(condition) if isinstance(condition, dict) else type(condition).__name__}"
            )
        return condition[OBSERVATION]


def measurement_reward(measurement: Measurement) -> MeasurementReward:
    """log p(y | x0) as a LogReward in model space; x0 is not clamped, as A x + noise is not."""
    return MeasurementReward(measurement)


def operator_facts(operator: Operator) -> dict[str, Any]:
    """The operator by its class and, of a dataclass, its fields: what tells it from others."""
    held = fields(operator) if is_dataclass(operator) else ()
    values = {one.name: getattr(operator, one.name) for one in held}
    told = {name: digest(v) if isinstance(v, Tensor) else v for name, v in values.items()}
    return {"class": type(operator).__qualname__, **told}


def digest(tensor: Tensor) -> str:
    """sha256 of the type, the shape and the numbers of a tensor."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()
