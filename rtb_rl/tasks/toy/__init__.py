"""Toys with exact answers: each function returns a `Toy`, a task and what its posterior must be.

    toy                       prior                    log r                     condition
    gaussian_chain            N(mean, variance)        linear or quadratic       none
    mixture_tilt              any Gaussian mixture     slope . x                 none
    mixture_tilt_over_beta    any Gaussian mixture     beta slope . x            beta
    mixture_observation       any Gaussian mixture     log N(y; H x, R)          y
    mixture_one_observation   any Gaussian mixture     log N(y; H x, R)          none
    mixture_reweighting       any Gaussian mixture     a gain for each mode      none
    nine_of_twenty_five       25 modes on a grid       log p_9 - log p_25        none
    rare_mode                 4 modes, one of 1e-3     a bump at the rare mode   none
    gaussian_bandit           N(slope s, variance)     -(c / 2) (u - g(s))^2     s
    mixture_bandit            3 modes, moved by s      a value for each mode     s
    three_modes               3 modes on a line        near one for the middle   none
    token_task                coupled tokens           coupled, random           none

`random_mixture`, `random_tilt` and `random_observation` make problems for the mixture toys; the
makers `shared_spread`, `learned_spread` and `mixture_posterior` make their posteriors.
`gaussian_floors` and `token_floors` say what kernels of finitely many levels can reach at best.
"""

from rtb_rl.tasks.toy.answer import Toy
from rtb_rl.tasks.toy.bandit import QuadraticBandit, gaussian_bandit, mixture_bandit
from rtb_rl.tasks.toy.chain import (
    AffineDenoiser,
    Chain,
    GaussianDenoiser,
    NarrowedDenoiser,
    Quadratic,
    chain_of,
    denoiser_of,
    exact_posterior,
    exact_spread,
    gaussian_chain,
    linear_reward,
    moment_errors,
    squared_reward,
    tilt,
)
from rtb_rl.tasks.toy.enumeration import TokenSpace, total_variation
from rtb_rl.tasks.toy.floors import TokenFloor, token_floors
from rtb_rl.tasks.toy.line import (
    calibrated_steps,
    even_grid,
    kolmogorov_distance,
    large_steps,
    small_steps,
    terminal_density,
    three_modes,
)
from rtb_rl.tasks.toy.line_floors import LineFloor, gaussian_floors
from rtb_rl.tasks.toy.mixture import GaussianMixture, MixtureDenoiser, MixtureSteps
from rtb_rl.tasks.toy.mixture_tasks import (
    mixture_chain,
    mixture_observation,
    mixture_one_observation,
    mixture_reweighting,
    mixture_tilt,
    mixture_tilt_over_beta,
)
from rtb_rl.tasks.toy.mode_errors import mode_errors, weight_error
from rtb_rl.tasks.toy.nine_of_twenty_five import (
    SCALE,
    nine_of_twenty_five,
    plotting_coordinates,
    rare_mode,
    twenty_five,
)
from rtb_rl.tasks.toy.posterior import (
    PosteriorMaker,
    learned_spread,
    mixture_posterior,
    shared_spread,
)
from rtb_rl.tasks.toy.random_mixture import random_mixture, random_observation, random_tilt
from rtb_rl.tasks.toy.tokens import TabularCorrection, TabularDenoiser, terminal_law, token_task

__all__ = [
    "SCALE",
    "AffineDenoiser",
    "Chain",
    "GaussianDenoiser",
    "GaussianMixture",
    "LineFloor",
    "MixtureDenoiser",
    "MixtureSteps",
    "NarrowedDenoiser",
    "PosteriorMaker",
    "Quadratic",
    "QuadraticBandit",
    "TabularCorrection",
    "TabularDenoiser",
    "TokenFloor",
    "TokenSpace",
    "Toy",
    "calibrated_steps",
    "chain_of",
    "denoiser_of",
    "even_grid",
    "exact_posterior",
    "exact_spread",
    "gaussian_bandit",
    "gaussian_chain",
    "gaussian_floors",
    "kolmogorov_distance",
    "large_steps",
    "learned_spread",
    "linear_reward",
    "mixture_bandit",
    "mixture_chain",
    "mixture_observation",
    "mixture_one_observation",
    "mixture_posterior",
    "mixture_reweighting",
    "mixture_tilt",
    "mixture_tilt_over_beta",
    "mode_errors",
    "moment_errors",
    "nine_of_twenty_five",
    "plotting_coordinates",
    "random_mixture",
    "random_observation",
    "random_tilt",
    "rare_mode",
    "shared_spread",
    "small_steps",
    "squared_reward",
    "terminal_density",
    "terminal_law",
    "three_modes",
    "tilt",
    "token_floors",
    "token_task",
    "total_variation",
    "twenty_five",
    "weight_error",
]
