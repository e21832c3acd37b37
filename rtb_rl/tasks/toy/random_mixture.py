"""Random mixture problems of any size, on the scale that networks like."""

import torch
from torch import Generator, Tensor

from rtb_rl.tasks.toy.mixture import GaussianMixture
from rtb_rl.tasks.toy.mixture_tasks import measure

CHANGE = 0.35
"""How far, in total variation, a random reward moves the weights of the modes."""


def random_mixture(size: int, components: int, *, generator: Generator) -> GaussianMixture:
    """Modes that can be told apart, with full covariances: mean 0 and variance 1 per coordinate.

    Of many draws of means, the one whose nearest two are farthest apart; standard deviations within
    a mode between 0.15 and 0.35 along random axes.
    """
    f64 = torch.float64
    trials = torch.randn((256, components, size), generator=generator, dtype=f64)
    means = max(trials, key=lambda trial: float(torch.pdist(trial).min()))
    noise = torch.randn((components, size, size), generator=generator, dtype=f64)
    axes = torch.linalg.qr(noise).Q
    std = 0.15 + 0.2 * torch.rand((components, 1, size), generator=generator, dtype=f64)
    covariances = (axes * std.square()) @ axes.mT
    weights = (torch.randn(components, generator=generator, dtype=f64) / 2).softmax(0)
    means = means - weights @ means
    within = weights @ covariances.diagonal(dim1=1, dim2=2)
    means = means * ((1 - within) / (weights @ means.square())).sqrt()
    return GaussianMixture(weights, means, covariances)


def random_tilt(mixture: GaussianMixture, *, generator: Generator) -> Tensor:
    """A slope [size] in a random direction: the weakest that moves the weights by `CHANGE`."""
    direction = torch.randn(mixture.size, generator=generator, dtype=torch.float64)
    strengths = torch.linspace(0.1, 4, 40, dtype=torch.float64)
    slopes = strengths[:, None] * (direction / direction.norm())
    return slopes[_first_beyond_change(mixture, mixture.tilted(slopes)[0].weights)]


def random_observation(
    mixture: GaussianMixture, measured: int = 2, *, generator: Generator
) -> tuple[Tensor, Tensor]:
    """An operator [measured, size] with unit rows, and the covariance [measured, measured] of the
    noise: the loudest for which an average y still moves the weights by `CHANGE`.
    """
    operator = torch.randn((measured, mixture.size), generator=generator, dtype=torch.float64)
    operator = operator / operator.norm(dim=1, keepdim=True)
    x = mixture.sample(500, generator=generator)
    std = torch.linspace(3, 0.1, 30, dtype=torch.float64)
    candidates = std.square()[:, None, None] * torch.eye(measured, dtype=torch.float64)
    weights = [
        mixture.observed(operator, noise, measure(x, operator, noise, generator=generator))[0]
        for noise in candidates
    ]
    changed = torch.stack([posterior.weights for posterior in weights])
    return operator, candidates[_first_beyond_change(mixture, changed)]


def _first_beyond_change(mixture: GaussianMixture, weights: Tensor) -> int:
    """The first of weights [candidates, ..., n] whose mean distance from the mixture's is beyond
    `CHANGE`, or the farthest.
    """
    distance = (weights - mixture.weights).abs().sum(-1).reshape(len(weights), -1).mean(1) / 2
    beyond = (distance >= CHANGE).nonzero()
    return int(beyond[0] if len(beyond) else distance.argmax())
