"""How near Gaussian kernels can come to the exact posterior of a chain on the real line.

Kernels are free at each grid point, so no network limits them. The on-policy objective, the reverse
KL divergence between paths, is then a dynamic programme, exact up to the grid:

    V_0 = log r,   V_k(x) = max_q E_q V_{k-1} - KL(q || p(. | x)),   q Gaussian

and log Z - E V_K(x[K]) is the divergence that remains. All tensors float64, values in nats.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rtb_rl.tasks.toy.enumeration import tilted, total_variation
from rtb_rl.tasks.toy.line import (
    LineChain,
    Spread,
    calibrated_steps,
    even_grid,
    line_chain,
    middle_class,
    three_modes_chain,
    three_modes_mixture,
)

COARSE_POINTS, COARSE_SCALES, NEWTON_STEPS = 64, 7, 8

Choice = Callable[["Step"], tuple[Tensor, Tensor]]
"""Picks the posterior's kernel at every grid point: mean [G], std [G]."""


@dataclass(frozen=True)
class Step:
    """One step of the prior seen from its end.

    `mean` [G] and `std` [] of the prior's kernel, `value` [G] the best V one level below, and
    `tilted` [G, G] the exact posterior's step.
    """

    grid: Tensor
    mean: Tensor
    std: Tensor
    value: Tensor
    tilted: Tensor


@dataclass(frozen=True)
class LineFloor:
    """The best posterior of one family at `levels` steps.

    `tv`: total variation to p_K r / Z, the chain's own exact posterior. `tv_data`: to p r / Z with
    the data density p. `gap`: log Z - ELBO, nats.
    """

    family: str
    levels: int
    tv: float
    tv_data: float
    gap: float


def shared_spread(step: Step) -> tuple[Tensor, Tensor]:
    """Free mean, the prior's spread."""
    return best_kernels(step, limit=0.0)


def learned_spread(step: Step, *, limit: float = 1.5) -> tuple[Tensor, Tensor]:
    """Free mean, and a free factor exp(+-limit) at most on the spread at each point."""
    return best_kernels(step, limit=limit)


def matched_moments(step: Step) -> tuple[Tensor, Tensor]:
    """Mean and spread of the exact posterior's step: the best forward KL, not the reverse one."""
    mean = step.tilted @ step.grid
    variance = (step.tilted * (step.grid - mean[:, None]).square()).sum(1)
    return mean, variance.sqrt()


def gaussian_floors(
    levels: Sequence[int] = (5, 10, 20, 50, 100),
    *,
    spread: Spread = calibrated_steps,
    log_reward: Callable[[Tensor], Tensor] = middle_class,
) -> list[LineFloor]:
    """Floors of the chains of `three_modes`: kernels of the prior's spread, of a learned one, and
    with the moments of the exact posterior's steps.
    """
    families = {
        "shared spread": shared_spread,
        "learned spread": learned_spread,
        "matched moments": matched_moments,
    }
    grid = even_grid()
    density = three_modes_mixture().log_prob(grid[:, None]).softmax(0)
    floors = []
    for count in levels:
        chain = line_chain(*three_modes_chain(count, spread, torch.float64), grid)
        for family, choose in families.items():
            floors.append(line_floor(family, choose, chain, log_reward(grid), density))
    return floors


def line_floor(
    family: str, choose: Choice, prior: LineChain, log_reward: Tensor, density: Tensor
) -> LineFloor:
    """The floor of one family for a prior chain, with log r [G] and the law of the data [G]."""
    end = prior.terminal()
    posterior, value = solve(prior, log_reward, choose)
    law = posterior.terminal()
    gap = (end @ log_reward.exp()).log() - prior.start() @ value
    return LineFloor(
        family,
        prior.levels,
        tv=total_variation(law, tilted(end, log_reward)),
        tv_data=total_variation(law, tilted(density, log_reward)),
        gap=float(gap),
    )


def solve(prior: LineChain, log_reward: Tensor, choose: Choice) -> tuple[LineChain, Tensor]:
    """The chain of the chosen kernels, and V_K: [G], the mean log-weight of paths from there."""
    value, desirability = log_reward, log_reward.exp()
    means, stds = [], []
    for level in range(1, prior.levels + 1):
        prior_mean, prior_std = prior.mean[level - 1], prior.std[level - 1, 0]
        joint = prior.step(level) * desirability
        desirability = joint.sum(1)
        step = Step(prior.grid, prior_mean, prior_std, value, joint / desirability[:, None])
        mean, std = choose(step)
        value = objective(step, mean, std)[0]
        means.append(mean)
        stds.append(std)
    return LineChain(prior.grid, torch.stack(means), torch.stack(stds)), value


def objective(step: Step, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E V - KL(N(mean, std^2) || prior), E V', E V'' at each point: three tensors [G]."""
    value, slope, curvature = expectations(step.value, step.grid, mean, std)
    return value - divergence(mean, std, step.mean, step.std), slope, curvature


def best_kernels(step: Step, *, limit: float) -> tuple[Tensor, Tensor]:
    """The mean and std of highest objective at each point, |log(std / prior std)| <= limit.

    A coarse search finds the right hill; then mean and precision take Newton steps
    (arXiv 2107.04562), halved where the objective would fall.
    """
    mean, std = _coarse_search(step, limit)
    height, slope, curvature = objective(step, mean, std)
    damping = torch.ones_like(mean)
    bounds = [torch.tensor(sign * 2 * limit).exp().item() for sign in (-1, 1)]
    for _ in range(NEWTON_STEPS):
        precision = (1 - step.std.square() * curvature).clamp(*bounds) / step.std.square()
        pull = (slope - (mean - step.mean) / step.std.square()) / precision
        new_mean = mean + damping * pull
        new_std = torch.lerp(std.log(), -precision.log() / 2, damping).exp()
        trial = objective(step, new_mean, new_std)
        better = trial[0] >= height
        damping = torch.where(better, (2 * damping).clamp(max=1), damping / 2)
        mean, std = torch.where(better, new_mean, mean), torch.where(better, new_std, std)
        old = (height, slope, curvature)
        height, slope, curvature = map(partial(torch.where, better), trial, old)
    return mean, std


def _coarse_search(step: Step, limit: float) -> tuple[Tensor, Tensor]:
    """The best of a few means and scales, the prior's own among them: [G], [G]."""
    count = COARSE_SCALES if limit > 0 else 1
    scales = torch.linspace(-limit, limit, count, dtype=torch.float64).exp()
    means = torch.linspace(float(step.grid[0]), float(step.grid[-1]), COARSE_POINTS).double()
    mean, std = (t.flatten() for t in torch.meshgrid(means, step.std * scales, indexing="ij"))
    benefit = expectations(step.value, step.grid, mean, std)[0]
    height = benefit - divergence(mean, std, step.mean[:, None], step.std)
    best = height.max(1)
    prior_std = step.std.expand_as(step.mean)
    stay = objective(step, step.mean, prior_std)[0] >= best.values
    return (
        torch.where(stay, step.mean, mean[best.indices]),
        torch.where(stay, prior_std, std[best.indices]),
    )


def expectations(value: Tensor, grid: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, ...]:
    """E V, E V', E V'' under N(mean, std^2) for V given on the grid: three tensors [points].

    The derivatives as E[V z] / std and E[V (z^2 - 1)] / std^2; trapezoid rule in z.
    """
    z = torch.linspace(-8, 8, 65, dtype=torch.float64)
    weight = (z.square() / -2).softmax(0)
    v = interpolate(value, grid, mean[:, None] + std[:, None] * z)
    slope, curvature = v @ (weight * z), v @ (weight * (z.square() - 1))
    return v @ weight, slope / std, curvature / std.square()


def interpolate(value: Tensor, grid: Tensor, x: Tensor) -> Tensor:
    """The cubic through the four grid points around x; constant beyond the grid."""
    place = (x.clamp(float(grid[0]), float(grid[-1])) - grid[0]) / (grid[1] - grid[0])
    left = place.long().clamp(1, len(grid) - 3)
    t = place - left
    a, b, c, d = (value[left + offset] for offset in (-1, 0, 1, 2))
    outer = t * (t - 1) * ((t + 1) * d - (t - 2) * a) / 6
    return outer + (t + 1) * (t - 2) * ((t - 1) * b - t * c) / 2


def divergence(mean: Tensor, std: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(prior_mean, prior_std^2)), nats."""
    ratio = std / prior_std
    shift = (mean - prior_mean) / prior_std
    return (shift.square() + ratio.square() - 1) / 2 - ratio.log()
