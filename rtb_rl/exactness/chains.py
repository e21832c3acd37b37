"""Gaussian chains: residuals at the exact posterior, a learned start law, error against levels."""

import warnings
from dataclasses import asdict

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    Denoiser,
    GaussianDiffusion,
    Sampler,
    Schedule,
    StandardStart,
    StartStep,
    Trajectory,
    log_ratio,
    log_snr_schedule,
    log_weight,
    noise_back,
    residual,
    rollout,
    rollout_against,
    zero_terminal_signal,
)
from rtb_rl.core.gaussian import large_spread
from rtb_rl.core.protocols import Condition
from rtb_rl.exactness.fit import Effort, Row, fit_toy, row
from rtb_rl.nn import Correction, LearnedStart, ScaledCorrection
from rtb_rl.tasks.toy import (
    GaussianDenoiser,
    PosteriorMaker,
    Toy,
    chain_of,
    exact_posterior,
    exact_spread,
    gaussian_floors,
    linear_reward,
    moment_errors,
    squared_reward,
    three_modes,
    tilt,
)
from rtb_rl.training.mix import Mix
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.settings import FinetuneSettings
from rtb_rl.training.task import Task

RESIDUAL_BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4}
SIGNALS_LEFT = (0.068, 0.674)
"""At the last level of Stable Diffusion 1.5, and of the RL chain published with arXiv 2405.20971
(75 levels with the betas of 1000).
"""
BOUNDED_LEVELS = (10, 20)
"""Where the learned spread must halve the error of the shared one and come near the floor."""


class BumpTable(nn.Module):
    """A network of one coordinate that is a table: for each level, the weights of 51 bumps on it.

    (x [batch, 1], level, condition) -> [batch, outputs], zero at first. The bumps are Gaussians,
    0.16 wide and apart, normalised to sum to one, so that x beyond +-4 has the last one's weight.
    Linear in its weights and free at every level: what a trained posterior misses is then due to
    the training and its kernels, where a small network would add what it can't represent yet.
    """

    centres: Tensor

    def __init__(self, levels: int, outputs: int):
        super().__init__()
        self.register_buffer("centres", torch.linspace(-4, 4, 51), persistent=False)
        self.weights = nn.Parameter(torch.zeros(levels + 1, 51, outputs))

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        width = self.centres[1] - self.centres[0]
        bumps = (((x - self.centres) / width).square() / -2).softmax(1)
        return torch.einsum("bn,bno->bo", bumps, self.weights[level])


def shared_spread(prior: nn.Module, diffusion: GaussianDiffusion, size: int) -> Correction:
    """The prior plus a table; steps as wide as the prior's."""
    return Correction(prior, BumpTable(diffusion.levels, 1), diffusion)


def learned_spread(prior: nn.Module, diffusion: GaussianDiffusion, size: int) -> ScaledCorrection:
    """The prior plus a table, which also scales the spread of each step."""
    return ScaledCorrection(prior, BumpTable(diffusion.levels, 2), diffusion)


FAMILIES: dict[str, PosteriorMaker] = {
    "shared spread": shared_spread,
    "learned spread": learned_spread,
}
"""By the names that `gaussian_floors` gives them."""


def linear_chain(run: Run, effort: Effort, seed: int) -> list[Row]:
    """Largest residual at the exact posterior of a linear reward, on paths from anywhere.

    Steps are no narrower than 0.2: float32 rounds means to about 1e-7, and the log-ratio divides
    that by the square of the spread.
    """
    generator = generator_for(seed, "linear chain")
    mean, slope = torch.randn((2, 3), generator=generator, dtype=torch.float64)
    variance, reward = torch.tensor([0.25, 0.5, 1.0]).double(), linear_reward(slope)
    schedule = zero_terminal_signal(log_snr_schedule(10, first_noise=0.3))
    std, prior = exact_spread(schedule, variance), GaussianDenoiser(schedule, mean, variance)
    rows = []
    for dtype, bound in RESIDUAL_BOUNDS.items():
        diffusion = GaussianDiffusion(schedule, mean.shape, std, dtype=dtype)
        exact, value = exact_posterior(diffusion, prior, reward)
        for name, path in _paths(diffusion, exact, prior, generator).items():
            ratio = log_ratio(diffusion, exact, prior, path)
            weight = log_weight(reward(path.x0.double()).to(dtype), ratio, 1.0)
            largest = residual(value.log_mean_exp().to(dtype), weight).abs().max()
            case = f"linear reward, {str(dtype)[6:]}, {name} paths: largest residual"
            rows.append(row(case, seed, float(largest), bound))
    return rows


def _paths(
    diffusion: GaussianDiffusion, posterior: Denoiser, prior: Denoiser, generator: Generator
) -> dict[str, Trajectory]:
    """200 paths from each source, by its name; hand-made are independent points N(0, I)."""
    n = 200
    drawn = rollout(diffusion, prior, None, n, generator=generator)
    shape = (diffusion.levels + 1, n, *diffusion.event_shape)
    return {
        "on-policy": rollout(diffusion, posterior, None, n, generator=generator),
        "prior": drawn,
        "noised-data": noise_back(diffusion, drawn.x0, None, generator=generator),
        "widened": rollout_against(
            diffusion, posterior, prior, None, n, widening=2.0, generator=generator
        )[0],
        "hand-made": Trajectory(torch.randn(shape, generator=generator, dtype=diffusion.dtype)),
    }


def learned_start(run: Run, effort: Effort, seed: int) -> list[Row]:
    """Errors of mean and variance where signal is left at the last level: with the prior's start
    law and with a learned one.
    """
    rows = []
    for signal in SIGNALS_LEFT:
        for name, toy in starts(signal).items():
            settings = _settings(effort.line_updates // 2)
            stage = run.stage(
                f"{name}-start-{signal}", {"seed": seed, "signal": signal, **asdict(settings)}
            )
            posterior = fit_toy(stage, toy, settings, seed=seed)
            draws = Sampler(toy.task.diffusion, posterior).sample(
                None, 50_000, generator=generator_for(seed, "start draws")
            )
            for moment, error in toy.errors(draws, None).items():
                case = f"signal {signal} left, {name} start: relative error of the {moment}"
                rows.append(row(case, seed, error, 0.05 if name == "learned" else None))
    return rows


def starts(signal_left: float) -> dict[str, Toy]:
    """A chain of six levels for data N(1, 0.25), rewarded near 1.8; the same on a `StartStep`."""
    one, reward = torch.ones(1, dtype=torch.float64), squared_reward(*torch.tensor([[3.0], [1.8]]))
    schedule = Schedule(torch.linspace(1, signal_left, 7, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the schedule leaves signal")
        inner = GaussianDiffusion(schedule, (1,), large_spread(schedule))
    prior = GaussianDenoiser(schedule, one, one / 4)
    chain = chain_of(inner, prior)
    prior_mean, _ = chain.final(0 * one, one)
    tilted, value = tilt(chain, reward)
    mean, variance = tilted.final(*value.tilted_start())
    outer = StartStep(inner)

    def toy(diffusion: GaussianDiffusion | StartStep, prior: nn.Module, posterior: nn.Module):
        task = Task("start", diffusion, prior, posterior, lambda x0, condition: reward(x0).float())
        return Toy(
            task,
            log_z=lambda condition: value.log_mean_exp().reshape(1),
            errors=lambda x0, condition: moment_errors(x0, prior_mean, mean, variance),
        )

    shared, own = learned_spread(prior, inner, 0), learned_spread(prior, inner, 0)
    return {
        "prior": toy(inner, prior, shared),
        "learned": toy(outer, StandardStart(prior, outer), LearnedStart(own, outer)),
    }


def levels(run: Run, effort: Effort, seed: int) -> list[Row]:
    """Total variation by number of levels and family, trained and at its floor."""
    floors = {(f.family, f.levels): f.tv for f in gaussian_floors(effort.line_levels)}
    rows = []
    for count in effort.line_levels:
        trained = {}
        for family, maker in FAMILIES.items():
            tv, floor = _trained(run, maker, family, count, effort, seed), floors[family, count]
            near = 0.2 if family == "learned spread" and count in BOUNDED_LEVELS else None
            rows += [
                row(f"levels: {family}, trained, T = {count}", seed, tv),
                row(f"levels: {family}, floor, T = {count}", seed, floor),
                row(f"{family}, T = {count}: TV above the floor's", seed, tv / floor - 1, near),
            ]
            trained[family] = tv
        ratio = trained["learned spread"] / trained["shared spread"]
        case = f"learned spread, T = {count}: TV over the shared spread's"
        rows.append(row(case, seed, ratio, 0.5 if count in BOUNDED_LEVELS else None))
    return rows


def _trained(
    run: Run, maker: PosteriorMaker, family: str, count: int, effort: Effort, seed: int
) -> float:
    """Total variation of a trained posterior to the exact one, propagated on a grid."""
    toy, settings = three_modes(count, posterior=maker), _settings(effort.line_updates)
    stage = run.stage(
        f"{family.replace(' ', '-')}-{count}",
        {"seed": seed, "family": family, "levels": count, **asdict(settings)},
    )
    posterior = fit_toy(stage, toy, settings, seed=seed)
    return toy.task.evaluate(Sampler(toy.task.diffusion, posterior))["tv"]


def _settings(updates: int) -> FinetuneSettings:
    """On-policy paths alone, whose optimum is the floor, with every level in the gradient."""
    return FinetuneSettings(
        updates=updates,
        beta_warmup=30,
        conditions=16,
        mix=Mix(on_policy=8, data=0),
        levels_per_path=None,
        learning_rate=3e-2,
        last_learning_rate=0.02,
        log_z_learning_rate=1e-2,
        average_decay=0.99,
    )
