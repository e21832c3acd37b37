"""Images smoothed by a Gaussian: a prior on real images of which everything is known.

A mixture of N(x_i, width^2 I) over the points x_i of a data set, in model space. Its denoiser is a
softmax over the data, and the probability of a class its Bayes classifier gives makes a reward
whose log Z is the frequency of the class and whose posterior is the points of that class, smoothed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import Schedule
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError

LEAST = -75.0
"""Of scores below the highest one: exp of less counts for nothing and, where it is no normal
float32, takes many times as long."""


class SmoothedImages(nn.Module):
    """mean_i N(x_i, width^2 I), points x_i [n, channels, height, width] in model space."""

    points: Tensor

    def __init__(self, points: Tensor, width: float):
        super().__init__()
        if points.ndim != 4 or not len(points) or not width > 0:
            raise InputError(
                f"smoothed images need points [n, channels, height, width] and a width above 0,"
                f" not {tuple(points.shape)} and {width}"
            )
        self.register_buffer("points", points, persistent=False)
        self.width = width

    def scores(
        self, x: Tensor, signal: Tensor | float = 1.0, noise: Tensor | float = 0.0
    ) -> Tensor:
        """log N(x; signal x_i, variance) without what all i share: [batch, n].

        `signal`, `noise`: numbers or [batch, 1]; by default x is x_0 itself.
        """
        points = self.points.flatten(1).to(x.dtype)
        half = points.square().sum(1) / 2
        inner = signal * (x.flatten(1) @ points.T - signal * half)
        return inner / _variance(self.width, signal, noise)

    def log_responsibilities(
        self, x: Tensor, signal: Tensor | float = 1.0, noise: Tensor | float = 0.0
    ) -> Tensor:
        """log p(i | signal x_0 + noise eps = x): [batch, n]; arguments as of `scores`."""
        scores = self.scores(x, signal, noise)
        return scores - log_sum(scores)[:, None]

    def log_prob(
        self, x: Tensor, signal: Tensor | float = 1.0, noise: Tensor | float = 0.0
    ) -> Tensor:
        """log density of signal x_0 + noise eps at x, nats: [batch]."""
        variance = _variance(self.width, signal, noise)
        size = self.points[0].numel()
        log_normaliser = (math.tau * x.new_tensor(1) * variance).log() * (size / 2)
        own = x.flatten(1).square().sum(1, keepdim=True) / (2 * variance)
        total = log_sum(self.scores(x, signal, noise))[:, None]
        return (total - own - log_normaliser).squeeze(1) - math.log(len(self.points))

    def expected_clean(self, x: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """E[x_0 | signal x_0 + noise eps = x], shaped as x; `signal`, `noise`: [batch, 1].

        Each component's own mean, x_i + gain (x - signal x_i), weighted by its responsibility.
        """
        points = self.points.flatten(1).to(x.dtype)
        gain = signal * self.width**2 / _variance(self.width, signal, noise)
        nearest = shares(self.scores(x, signal, noise)) @ points
        return ((1 - gain * signal) * nearest + gain * x.flatten(1)).reshape_as(x)

    def sample(self, n: int, *, generator: Generator) -> Tensor:
        """`n` draws: [n, channels, height, width]."""
        points = self.points
        rows = torch.randint(len(points), (n,), generator=generator, device=points.device)
        eps = torch.randn(
            (n, *points.shape[1:]), generator=generator, device=points.device, dtype=points.dtype
        )
        return points[rows] + self.width * eps


class SmoothedDenoiser(nn.Module):
    """E[x_0 | x_k] at the levels of a schedule; the condition is ignored."""

    signal: Tensor
    noise: Tensor

    def __init__(self, smoothed: SmoothedImages, schedule: Schedule):
        super().__init__()
        self.smoothed = smoothed
        self.register_buffer("signal", schedule.signal[:, None], persistent=False)
        self.register_buffer("noise", schedule.noise[:, None], persistent=False)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        signal, noise = (table[level].to(x.dtype) for table in (self.signal, self.noise))
        return self.smoothed.expected_clean(x, signal, noise)


class NoiseOutput(NamedTuple):
    """The predicted noise, under the name that diffusers gives it."""

    sample: Tensor


class SmoothedUNet(nn.Module):
    """The exact noise prediction E[eps | x_t], called as diffusers' UNet2DModel is.

    `alphas_cumprod`: signal^2 at timesteps 0..T - 1, as a scheduler has it.
    """

    signal: Tensor
    noise: Tensor

    def __init__(self, smoothed: SmoothedImages, alphas_cumprod: Tensor):
        super().__init__()
        self.smoothed = smoothed
        squared = alphas_cumprod.double()[:, None]
        self.register_buffer("signal", squared.sqrt(), persistent=False)
        self.register_buffer("noise", (1 - squared).sqrt(), persistent=False)
        channels, *size = smoothed.points.shape[1:]
        self.config = {
            "in_channels": channels,
            "out_channels": channels,
            "sample_size": tuple(size),
        }

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> NoiseOutput:
        """`timestep`: one for all rows, or int64 [batch]. The output is both tuple and object."""
        steps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        signal, noise = (table[steps].to(sample.dtype) for table in (self.signal, self.noise))
        x0 = self.smoothed.expected_clean(sample, signal, noise)
        shape = (-1, *(1,) * (sample.ndim - 1))
        return NoiseOutput((sample - signal.reshape(shape) * x0) / noise.reshape(shape))


class BayesClassifier(nn.Module):
    """log p(class | x) of the mixture, exactly: [batch, classes], x in model space."""

    labels: Tensor

    def __init__(self, smoothed: SmoothedImages, labels: Tensor, classes: int):
        super().__init__()
        if labels.shape != (len(smoothed.points),):
            raise InputError(
                f"{len(smoothed.points)} points came with labels {tuple(labels.shape)}; give one"
                " a point"
            )
        self.smoothed, self.classes = smoothed, classes
        self.register_buffer("labels", labels, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.smoothed.log_responsibilities(x)
        columns = [scores[:, self.labels == label] for label in range(self.classes)]
        return torch.stack([column.logsumexp(1) for column in columns], 1)


@dataclass(frozen=True, eq=False)
class BayesReward:
    """log p(x belongs to one of the classes), a LogReward in model space.

    `labels`: int64 [n] of the points. By Bayes' rule Z is the share of points of these classes and
    the posterior at beta 1 is the mixture over them alone. InputError where there are none.
    """

    smoothed: SmoothedImages
    labels: Tensor
    classes: Sequence[int]
    differentiable = True

    def __post_init__(self):
        if not bool(self._chosen.any()):
            raise InputError(
                f"no point is of class {', '.join(map(str, self.classes))}; the labels are"
                f" {sorted(set(self.labels.tolist()))}"
            )

    def __call__(self, x0: Tensor, condition: Condition) -> Tensor:
        return log_sum(self.smoothed.log_responsibilities(x0)[:, self._chosen])

    @property
    def log_z(self) -> float:
        """log of the share of the points, nats."""
        return math.log(float(self._chosen.double().mean()))

    @property
    def posterior(self) -> SmoothedImages:
        """The exact posterior at beta 1."""
        return SmoothedImages(self.smoothed.points[self._chosen], self.smoothed.width)

    @property
    def _chosen(self) -> Tensor:
        return torch.isin(self.labels, torch.tensor(self.classes, device=self.labels.device))


def shares(scores: Tensor) -> Tensor:
    """softmax over the last axis."""
    return _below_highest(scores).softmax(-1)


def log_sum(scores: Tensor) -> Tensor:
    """log sum exp over the last axis."""
    return _below_highest(scores).exp().sum(-1).log() + scores.amax(-1)


def _below_highest(scores: Tensor) -> Tensor:
    return (scores - scores.amax(-1, keepdim=True)).clamp(min=LEAST)


def _variance(width: float, signal: Tensor | float, noise: Tensor | float) -> Tensor | float:
    """Of each component, noised."""
    return signal**2 * width**2 + noise**2
