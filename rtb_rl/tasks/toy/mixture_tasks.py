"""Toys whose prior is a Gaussian mixture and whose posterior is another one, in closed form."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Generator, Tensor

from rtb_rl.core import GaussianDiffusion, log_snr_schedule, zero_terminal_signal
from rtb_rl.core.gaussian import calibrated_spread, large_spread
from rtb_rl.core.protocols import Condition
from rtb_rl.tasks.toy.answer import Toy
from rtb_rl.tasks.toy.mixture import GaussianMixture, MixtureSteps, gaussian_log_prob
from rtb_rl.tasks.toy.mode_errors import weight_error
from rtb_rl.tasks.toy.posterior import PosteriorMaker
from rtb_rl.training.task import Task

Answer = Callable[[Condition], tuple[GaussianMixture, Tensor]]
"""The exact posterior for each row of a condition, and log Z: [rows] or a scalar."""
Errors = Callable[[Tensor, GaussianMixture], Mapping[str, float]]
"""How far draws [*rows, n, size] are from a posterior, by name."""

FIRST_NOISE = 0.6
CALIBRATION_DRAWS = 20_000


def mixture_chain(
    mixture: GaussianMixture, levels: int, *, generator: Generator
) -> tuple[GaussianDiffusion, MixtureSteps]:
    """A diffusion that leaves no signal and resolves the mixture, and its exact steps.

    The first level adds `FIRST_NOISE` of the narrowest standard deviation. The chain's own law
    still differs from the mixture, since its steps are Gaussian.
    """
    first_noise = FIRST_NOISE * float(mixture.variances.min().sqrt())
    schedule = zero_terminal_signal(
        log_snr_schedule(levels, first_noise=first_noise, last_signal=0.2)
    )
    diffusion = GaussianDiffusion(schedule, (mixture.size,), large_spread(schedule))
    denoiser = mixture.denoiser(schedule)
    x0 = mixture.sample(CALIBRATION_DRAWS, generator=generator).float()
    std = calibrated_spread(diffusion, denoiser, x0, None, generator=generator)
    diffusion = diffusion.with_spread(std)
    return diffusion, MixtureSteps(denoiser, diffusion)


def mixture_tilt(
    mixture: GaussianMixture,
    slope: Tensor,
    *,
    levels: int,
    posterior: PosteriorMaker,
    generator: Generator,
) -> Toy:
    """log r(x) = slope . x, with slope [size]."""
    task = unconditional(
        "mixture_tilt",
        mixture,
        lambda x0: x0 @ slope.to(x0.dtype),
        levels=levels,
        posterior=posterior,
        generator=generator,
    )
    return answered(task, lambda condition: mixture.tilted(slope))


def mixture_tilt_over_beta(
    mixture: GaussianMixture,
    slope: Tensor,
    low: float,
    high: float,
    *,
    levels: int,
    posterior: PosteriorMaker,
    generator: Generator,
) -> Toy:
    """log r(x | beta) = beta slope . x: one posterior for every strength between two bounds.

    The condition is beta, [batch, 1], uniform in [low, high]; the data are draws of the prior.
    """
    diffusion, prior = mixture_chain(mixture, levels, generator=generator)

    def draw_conditions(n: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
        beta = low + (high - low) * torch.rand((n, 1), generator=generator)
        return beta, mixture.sample(n, generator=generator).float()

    def log_reward(x0: Tensor, condition: Condition) -> Tensor:
        return as_tensor(condition)[:, 0] * (x0 @ slope.to(x0.dtype))

    task = Task(
        name="mixture_tilt_over_beta",
        diffusion=diffusion,
        prior=prior,
        posterior=posterior(prior, diffusion, 1),
        log_reward=log_reward,
        draw_conditions=draw_conditions,
    )
    return answered(task, lambda condition: mixture.tilted(as_tensor(condition) * slope))


def mixture_observation(
    mixture: GaussianMixture,
    operator: Tensor,
    noise: Tensor,
    *,
    levels: int,
    posterior: PosteriorMaker,
    generator: Generator,
) -> Toy:
    """log r(x | y) = log N(y; operator x, noise) for all y at once, with operator [m, size].

    The condition is y, [batch, m], drawn with the x0 that it is a measurement of. That x0 is a draw
    of the prior, and given y one of the exact posterior: good off-policy data, and the truth that
    simulation-based calibration ranks.
    """
    diffusion, prior = mixture_chain(mixture, levels, generator=generator)

    def draw_conditions(n: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
        x0 = mixture.sample(n, generator=generator)
        return measure(x0, operator, noise, generator=generator).float(), x0.float()

    def log_reward(x0: Tensor, condition: Condition) -> Tensor:
        return log_likelihood(x0, operator, noise, as_tensor(condition))

    task = Task(
        name="mixture_observation",
        diffusion=diffusion,
        prior=prior,
        posterior=posterior(prior, diffusion, len(operator)),
        log_reward=log_reward,
        draw_conditions=draw_conditions,
    )
    return answered(task, lambda y: mixture.observed(operator, noise, as_tensor(y)))


def mixture_one_observation(
    mixture: GaussianMixture,
    operator: Tensor,
    noise: Tensor,
    y: Tensor,
    *,
    levels: int,
    posterior: PosteriorMaker,
    generator: Generator,
) -> Toy:
    """log r(x) = log N(y; operator x, noise) for one y, [m]; the data are draws of the prior."""
    task = unconditional(
        "mixture_one_observation",
        mixture,
        lambda x0: log_likelihood(x0, operator, noise, y),
        levels=levels,
        posterior=posterior,
        generator=generator,
    )
    return answered(task, lambda condition: mixture.observed(operator, noise, y))


def mixture_reweighting(
    name: str,
    mixture: GaussianMixture,
    log_gain: Tensor,
    errors: Errors,
    *,
    levels: int,
    posterior: PosteriorMaker,
    generator: Generator,
) -> Toy:
    """log r(x) = log sum_n p(n | x) exp(log_gain[n]): the same modes, other weights.

    Where one mode alone is near, log r is its gain; in between it is smooth. `log_gain`: [n], minus
    infinity for a mode that must go.
    """
    task = unconditional(
        name,
        mixture,
        lambda x0: log_gain_at(mixture, log_gain, x0),
        levels=levels,
        posterior=posterior,
        generator=generator,
    )
    return answered(task, lambda condition: mixture.reweighted(log_gain), errors)


def answered(task: Task, answer: Answer, errors: Errors = weight_error) -> Toy:
    """The task with exact draws of its target, log Z and errors, all read off one closed form."""

    def draw_target(condition: Condition, n: int, *, generator: Generator) -> Tensor:
        return answer(condition)[0].sample(n, generator=generator).float()

    return Toy(
        replace(task, draw_target=draw_target),
        log_z=lambda condition: answer(condition)[1].reshape(-1),
        errors=lambda x0, condition: errors(x0, answer(condition)[0]),
    )


def unconditional(
    name: str,
    mixture: GaussianMixture,
    log_reward: Callable[[Tensor], Tensor],
    *,
    levels: int,
    posterior: PosteriorMaker,
    generator: Generator,
) -> Task:
    """A task without conditions, whose data are independent draws of the mixture."""
    diffusion, prior = mixture_chain(mixture, levels, generator=generator)

    def draw(n: int, *, generator: Generator) -> tuple[Condition, Tensor | None]:
        return None, mixture.sample(n, generator=generator).float()

    return Task(
        name=name,
        diffusion=diffusion,
        prior=prior,
        posterior=posterior(prior, diffusion, 0),
        log_reward=lambda x0, condition: log_reward(x0),
        draw_conditions=draw,
    )


def measure(x: Tensor, operator: Tensor, noise: Tensor, *, generator: Generator) -> Tensor:
    """operator x + N(0, noise): [n, m] for x [n, size]."""
    eps = torch.randn((len(x), len(noise)), generator=generator, dtype=noise.dtype)
    return x @ operator.mT + eps @ torch.linalg.cholesky(noise).mT


def log_likelihood(x0: Tensor, operator: Tensor, noise: Tensor, y: Tensor) -> Tensor:
    """log N(y; operator x0, noise), nats: [batch]."""
    return gaussian_log_prob(y.double() - x0.double() @ operator.mT, noise).to(x0.dtype)


def log_gain_at(mixture: GaussianMixture, log_gain: Tensor, x0: Tensor) -> Tensor:
    """log sum_n p(n | x0) exp(log_gain[n]), nats: [batch]; gains [n] or [batch, n]."""
    return (mixture.log_responsibilities(x0) + log_gain).logsumexp(-1).to(x0.dtype)


def as_tensor(condition: Condition) -> Tensor:
    """The condition of a toy that has one."""
    assert isinstance(condition, Tensor)
    return condition
