"""A short linear-Gaussian chain whose every step can be trained, with exact expectations."""

import itertools

import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    GaussianDiffusion,
    ScaledPrediction,
    Trajectory,
    log_snr_schedule,
    zero_terminal_signal,
)
from rtb_rl.core.protocols import Condition
from rtb_rl.tasks.toy import (
    Chain,
    GaussianDenoiser,
    Quadratic,
    chain_of,
    denoiser_of,
    exact_spread,
    linear_reward,
    squared_reward,
    tilt,
)
from rtb_rl.training import Task

LEVELS = 3
ZERO, ONE = torch.zeros(1).double(), torch.ones(1).double()
SCHEDULE = zero_terminal_signal(log_snr_schedule(LEVELS, first_noise=0.3))
DIFFUSION = GaussianDiffusion(SCHEDULE, (1,), exact_spread(SCHEDULE, ONE / 4), dtype=torch.float64)
PRIOR = GaussianDenoiser(SCHEDULE, ONE, ONE / 4)
PRIOR_CHAIN = chain_of(DIFFUSION, PRIOR)
LINEAR, CONCAVE = linear_reward(1.5 * ONE), squared_reward(3 * ONE, 1.8 * ONE)


class FreeSteps(nn.Module):
    """slope[k] x + shift[k], and a factor on each spread if `log_scale` is trained; [K, 1]."""

    def __init__(self, chain: Chain, *, scaled: bool):
        super().__init__()
        affine = denoiser_of(DIFFUSION, chain)
        self.slope, self.shift = nn.Parameter(affine.slope), nn.Parameter(affine.shift)
        log_scale = (chain.std / PRIOR_CHAIN.std).log() if scaled else 0 * chain.std
        self.log_scale = nn.Parameter(log_scale, requires_grad=scaled)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> ScaledPrediction:
        row = level - 1
        return ScaledPrediction(self.slope[row] * x + self.shift[row], self.log_scale[row])


def make_task(reward: Quadratic, *, scaled: bool, chain: Chain = PRIOR_CHAIN) -> Task:
    """Data N(1, 1/4) under the reward; a posterior of free steps that starts as the chain."""
    posterior = FreeSteps(chain, scaled=scaled)
    return Task("affine", DIFFUSION, PRIOR, posterior, lambda x0, condition: reward(x0))


def tilted(reward: Quadratic) -> Chain:
    """The chain of the exact posterior."""
    return tilt(PRIOR_CHAIN, reward)[0]


def moments(model: nn.Module) -> tuple[float, float]:
    """Mean and variance of the model's x[0]."""
    mean, variance = chain_of(DIFFUSION, model).final(ZERO, ONE)
    return float(mean), float(variance)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


@torch.no_grad()
def quadrature(model: nn.Module, *, nodes: int = 5) -> tuple[Trajectory, Tensor]:
    """Paths of the model and their weights: exact for polynomials of the noises to degree 9."""
    points, weights = (torch.as_tensor(array) for array in hermegauss(nodes))
    index = torch.tensor(list(itertools.product(range(nodes), repeat=LEVELS + 1)))
    noise = points[index]
    path = [noise[:, :1]]
    for k in range(LEVELS, 0, -1):
        level = torch.full((len(noise),), k)
        kernel = DIFFUSION.kernel(model(path[-1], level, None), path[-1], level)
        path.append(kernel.mean + kernel.std * noise[:, k : k + 1])
    return Trajectory(torch.stack(path[::-1])), (weights / weights.sum())[index].prod(1)
