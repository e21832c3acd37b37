"""Two toys of modes far apart: 25 of which 9 are wanted, and one that the prior hardly knows."""

import math

import torch
from torch import Generator, Tensor

from rtb_rl.tasks.toy.answer import Toy
from rtb_rl.tasks.toy.mixture import GaussianMixture
from rtb_rl.tasks.toy.mixture_tasks import mixture_reweighting
from rtb_rl.tasks.toy.mode_errors import mode_errors
from rtb_rl.tasks.toy.posterior import PosteriorMaker

VARIANCE = 0.3
SCALE = math.sqrt(50 + VARIANCE)
"""Standard deviation of the 25 modes in plotting coordinates; x0 is in units of it."""

GRID = (-10, -5, 0, 5, 10)
WANTED = {
    (-10, -5): 4,
    (-5, -10): 10,
    (-5, 0): 4,
    (10, -5): 5,
    (0, 0): 10,
    (0, 5): 5,
    (5, -5): 4,
    (5, 0): 15,
    (5, 10): 4,
}
"""Posterior weights times 61."""


def twenty_five() -> GaussianMixture:
    """Equal modes N(m, 0.3 I) on the grid {-10, -5, 0, 5, 10}^2, in units of `SCALE`."""
    means = torch.cartesian_prod(*2 * [torch.tensor(GRID, dtype=torch.float64)])
    covariance = VARIANCE * torch.eye(2, dtype=torch.float64)
    weights = torch.full((25,), 1 / 25, dtype=torch.float64)
    return GaussianMixture(weights, means / SCALE, (covariance / SCALE**2).expand(25, 2, 2))


def nine_of_twenty_five(*, levels: int, posterior: PosteriorMaker, generator: Generator) -> Toy:
    """log r = log p_9 - log p_25 with the true densities: log Z = 0, and r is at most 375 / 61.

    arXiv 2405.20971, appendix C, with the covariance of its code. Errors: `mode_errors` over all 25
    modes, so that draws left in the other 16 count. `plotting_coordinates` undoes the scale.
    """
    weights = [WANTED.get((a, b), 0) / 61 for a in GRID for b in GRID]
    log_gain = (25 * torch.tensor(weights, dtype=torch.float64)).log()
    return mixture_reweighting(
        "nine_of_twenty_five",
        twenty_five(),
        log_gain,
        mode_errors,
        levels=levels,
        posterior=posterior,
        generator=generator,
    )


def plotting_coordinates(x0: Tensor) -> Tensor:
    """Points of the 25 -> 9 toy in the coordinates of the paper, modes 5 apart."""
    return SCALE * x0


def rare_mode(
    *,
    prior_mass: float = 1e-3,
    posterior_mass: float = 0.5,
    levels: int,
    posterior: PosteriorMaker,
    generator: Generator,
) -> Toy:
    """Four modes at (+-1, +-1), the last of them rare under the prior and wanted in the posterior.

    log r is zero but near the rare mode, so that nothing leads there. Errors: `mode_errors`, the
    "rare_weight" found and its relative "rare_weight_error".
    """
    means = torch.cartesian_prod(*2 * [torch.tensor([-1.0, 1.0], dtype=torch.float64)])
    common = (1 - prior_mass) / 3
    weights = torch.tensor([common, common, common, prior_mass], dtype=torch.float64)
    prior = GaussianMixture(weights, means, 0.04 * torch.eye(2).double().expand(4, 2, 2))
    odds = posterior_mass / (1 - posterior_mass) * (1 - prior_mass) / prior_mass

    def errors(x0: Tensor, exact: GaussianMixture) -> dict[str, float]:
        found = float((exact.nearest(x0) == 3).double().mean())
        rare = {"rare_weight": found, "rare_weight_error": abs(found / posterior_mass - 1)}
        return mode_errors(x0, exact) | rare

    return mixture_reweighting(
        "rare_mode",
        prior,
        torch.tensor([1.0, 1.0, 1.0, odds], dtype=torch.float64).log(),
        errors,
        levels=levels,
        posterior=posterior,
        generator=generator,
    )
