"""Contextual bandits: pi(u | s) proportional to mu(u | s) exp(Q(s, u)), with analytic priors mu.

The context s is the condition, [batch, 1]; Q takes the place of log r, any temperature in it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    GaussianDiffusion,
    ScaledPrediction,
    Schedule,
    log_snr_schedule,
    zero_terminal_signal,
)
from rtb_rl.core.protocols import Condition
from rtb_rl.nn import with_scale
from rtb_rl.tasks.toy.answer import Toy
from rtb_rl.tasks.toy.chain import (
    GaussianDenoiser,
    exact_spread,
    gaussian_draws,
    moment_errors,
)
from rtb_rl.tasks.toy.mixture import GaussianMixture
from rtb_rl.tasks.toy.mixture_tasks import (
    answered,
    as_tensor,
    log_gain_at,
    mixture_chain,
)
from rtb_rl.tasks.toy.mode_errors import mode_errors
from rtb_rl.tasks.toy.posterior import PosteriorMaker
from rtb_rl.training.task import Task


class ShiftedDenoiser(nn.Module):
    """The denoiser of data moved by slope * s, from that of the data before the move."""

    signal: Tensor

    def __init__(self, denoiser: nn.Module, schedule: Schedule, slope: float):
        super().__init__()
        self.denoiser, self.slope = denoiser, slope
        self.register_buffer("signal", schedule.signal[:, None], persistent=False)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> ScaledPrediction:
        shift = self.slope * as_tensor(condition).to(x.dtype)
        centred = x - self.signal.to(x.dtype)[level] * shift
        x0, log_scale = with_scale(self.denoiser(centred, level, None))
        return ScaledPrediction(shift + x0, log_scale)


@dataclass(frozen=True)
class QuadraticBandit:
    """mu(u | s) = N(slope s, variance), Q = -(stiffness / 2) (u - g(s))^2, g(s) = goal . (1, s)."""

    slope: float = 0.8
    variance: float = 0.25
    stiffness: float = 4.0
    goal: tuple[float, float] = (0.5, -0.5)

    @property
    def posterior_variance(self) -> float:
        """1 / (1 / variance + stiffness)."""
        return 1 / (1 / self.variance + self.stiffness)

    def wanted(self, s: Tensor) -> Tensor:
        """g(s)."""
        return self.goal[0] + self.goal[1] * s

    def posterior_mean(self, s: Tensor) -> Tensor:
        """(slope s / variance + stiffness g) * posterior variance."""
        precise = self.slope * s / self.variance + self.stiffness * self.wanted(s)
        return self.posterior_variance * precise

    def log_z(self, s: Tensor) -> Tensor:
        """-log(1 + c v) / 2 - c (m - g)^2 / (2 (1 + c v)): shaped as s."""
        scale = 1 + self.stiffness * self.variance
        distance = self.slope * s - self.wanted(s)
        return -math.log(scale) / 2 - self.stiffness * distance.square() / (2 * scale)


def gaussian_bandit(
    problem: QuadraticBandit = QuadraticBandit(), *, levels: int, posterior: PosteriorMaker
) -> Toy:
    """A Gaussian prior and a quadratic Q, s uniform in [-1, 1]; errors are `moment_errors`."""
    schedule = zero_terminal_signal(log_snr_schedule(levels))
    variance = torch.tensor([problem.variance], dtype=torch.float64)
    narrow = torch.tensor([problem.posterior_variance], dtype=torch.float64)
    diffusion = GaussianDiffusion(schedule, (1,), exact_spread(schedule, variance))
    centred = GaussianDenoiser(schedule, torch.zeros_like(variance), variance)
    prior = ShiftedDenoiser(centred, schedule, problem.slope)

    def draw_conditions(n: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
        s = uniform_contexts(n, generator=generator)
        return s, gaussian_draws(problem.slope * s, variance, 1, generator=generator)[:, 0]

    def log_reward(x0: Tensor, condition: Condition) -> Tensor:
        distance = x0 - problem.wanted(as_tensor(condition).to(x0.dtype))
        return -problem.stiffness / 2 * distance[:, 0].square()

    def draw_target(condition: Condition, n: int, *, generator: Generator) -> Tensor:
        mean = problem.posterior_mean(as_tensor(condition))
        return gaussian_draws(mean, narrow, n, generator=generator)

    def errors(x0: Tensor, condition: Condition) -> dict[str, float]:
        s = as_tensor(condition).double()
        return moment_errors(x0, problem.slope * s, problem.posterior_mean(s), narrow)

    model = posterior(prior, diffusion, 1)
    return Toy(
        Task(
            name="gaussian_bandit",
            diffusion=diffusion,
            prior=prior,
            posterior=model,
            log_reward=log_reward,
            draw_conditions=draw_conditions,
            draw_target=draw_target,
        ),
        log_z=lambda condition: problem.log_z(as_tensor(condition).double())[:, 0],
        errors=errors,
    )


MODES = (-1.0, 0.0, 1.0)
MODE_STD = 0.12
MODE_SHIFT = 0.3


def mixture_bandit(*, levels: int, posterior: PosteriorMaker, generator: Generator) -> Toy:
    """mu(u | s): three equal modes that move with s; Q(s, u) is `mode_values` on them.

    Between modes Q is smooth, log sum_n p(n | u, s) exp(Q_n), so that the posterior is exactly the
    mixture with weights w_n exp(Q_n), normalised. s is uniform in [-1, 1]. Errors: `mode_errors`.
    """
    centred = GaussianMixture(
        torch.full((3,), 1 / 3, dtype=torch.float64),
        torch.tensor(MODES)[:, None],
        torch.full((3, 1, 1), MODE_STD**2, dtype=torch.float64),
    )
    diffusion, denoiser = mixture_chain(centred, levels, generator=generator)
    prior = ShiftedDenoiser(denoiser, Schedule(diffusion.signal.flatten()), MODE_SHIFT)

    def answer(condition: Condition) -> tuple[GaussianMixture, Tensor]:
        s = as_tensor(condition).double()
        means = centred.means + MODE_SHIFT * s[..., None]
        weights = centred.weights.expand(len(s), -1)
        return GaussianMixture(weights, means, centred.covariances).reweighted(mode_values(s))

    def draw_conditions(n: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
        s = uniform_contexts(n, generator=generator)
        return s, centred.sample(n, generator=generator).float() + MODE_SHIFT * s

    def log_reward(x0: Tensor, condition: Condition) -> Tensor:
        s = as_tensor(condition).to(x0.dtype)
        return log_gain_at(centred, mode_values(s), x0 - MODE_SHIFT * s)

    task = Task(
        name="mixture_bandit",
        diffusion=diffusion,
        prior=prior,
        posterior=posterior(prior, diffusion, 1),
        log_reward=log_reward,
        draw_conditions=draw_conditions,
    )
    return answered(task, answer, mode_errors)


def mode_values(s: Tensor) -> Tensor:
    """Q on the three modes, (s, -1/2, -s): [batch, 3] in float64."""
    s = s.double()
    return torch.cat([s, torch.full_like(s, -0.5), -s], dim=1)


def uniform_contexts(n: int, *, generator: Generator) -> Tensor:
    """[n, 1], uniform in [-1, 1]."""
    return 2 * torch.rand((n, 1), generator=generator) - 1
