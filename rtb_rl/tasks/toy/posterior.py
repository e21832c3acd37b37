"""How a toy's posterior is made from its prior: an argument of every continuous toy."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import GaussianDiffusion, ScaledPrediction
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.nn import Correction, ResidualMLP, ScaledCorrection, scaled_correction
from rtb_rl.tasks.toy.mixture import MixtureSteps

PosteriorMaker = Callable[[nn.Module, GaussianDiffusion, int], nn.Module]
"""(prior, diffusion, condition_size) -> a posterior that starts as the prior."""

LIMIT = 1.5
"""Largest logarithm of a learned factor on a spread."""


def shared_spread(*, width: int = 64, blocks: int = 2, generator: Generator) -> PosteriorMaker:
    """The prior plus a small residual network; steps as wide as the prior's."""
    residual = partial(ResidualMLP, width=width, blocks=blocks, generator=generator)

    def make(prior: nn.Module, diffusion: GaussianDiffusion, condition_size: int) -> Correction:
        size = math.prod(diffusion.event_shape)
        network = residual(size, diffusion.levels, condition_size=condition_size, output_size=size)
        return Correction(prior, network, diffusion)

    return make


def learned_spread(*, width: int = 64, blocks: int = 2, generator: Generator) -> PosteriorMaker:
    """The prior plus a small residual network, which also scales the spread of each step."""
    residual = partial(ResidualMLP, width=width, blocks=blocks, generator=generator)

    def make(
        prior: nn.Module, diffusion: GaussianDiffusion, condition_size: int
    ) -> ScaledCorrection:
        size = math.prod(diffusion.event_shape)
        network = residual(
            size, diffusion.levels, condition_size=condition_size, output_size=2 * size
        )
        return ScaledCorrection(prior, network, diffusion)

    return make


def mixture_posterior(*, width: int = 64, blocks: int = 2, generator: Generator) -> PosteriorMaker:
    """As `learned_spread`, for a mixture as the prior: the network sees its responsibilities too.

    What a fine-tuned copy of a pretrained network has from the start, its features, an analytic
    denoiser can only hand over; from the bare point a small network learns modes slowly.
    """
    residual = partial(ResidualMLP, width=width, blocks=blocks, generator=generator)

    def make(
        prior: nn.Module, diffusion: GaussianDiffusion, condition_size: int
    ) -> "MixtureCorrection":
        if not isinstance(prior, MixtureSteps):
            raise InputError(
                f"mixture_posterior needs a prior of MixtureSteps, not {type(prior).__name__}; use"
                " learned_spread"
            )
        size = math.prod(diffusion.event_shape)
        inputs = size + prior.denoiser.means.shape[0]
        network = residual(
            inputs, diffusion.levels, condition_size=condition_size, output_size=2 * size
        )
        return MixtureCorrection(prior, network)

    return make


class MixtureCorrection(nn.Module):
    """A mixture's steps, corrected by a network of the point and the responsibilities.

    It moves the predicted x_0 by multiples of the standard deviation that x_0 has given x, and
    scales the spread of the step.
    """

    def __init__(self, prior: MixtureSteps, network: nn.Module):
        super().__init__()
        self.prior, self.network = prior, network

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> ScaledPrediction:
        with torch.no_grad():
            prediction, std, share = self.prior.moments(x, level)
        output = self.network(torch.cat([x, 2 * share], dim=-1), level, condition)
        return scaled_correction(prediction, output, 2 * std, LIMIT)
