"""One posterior for every observation, and one for every strength of the reward."""

from dataclasses import replace

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    ConditionalLogZ,
    Sampler,
    conditions,
    huber,
    importance_log_z,
    log_weight,
    rollout_against,
    rtb,
)
from rtb_rl.exactness.fit import Effort, Row, fit_toy, row
from rtb_rl.nn import MLP, ResidualMLP
from rtb_rl.tasks.toy import (
    Toy,
    mixture_observation,
    mixture_posterior,
    mixture_tilt_over_beta,
    random_mixture,
    random_observation,
    random_tilt,
)
from rtb_rl.training.mix import Mix
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.settings import FinetuneSettings

LEVELS, MODES = 40, 4
SETTINGS = FinetuneSettings(
    beta_warmup=30,
    conditions=128,
    mix=Mix(on_policy=4, data=1),
    levels_per_path=8,
    chunk=2048,
    learning_rate=6e-3,
    last_learning_rate=0.02,
    log_z_learning_rate=4e-3,
    average_decay=0.98,
)
"""Many conditions, few paths of each: the networks are what joins the paths of one condition.

The data are x0 that y was measured from: exact draws of the posterior given y.
"""

OVER_BETA = replace(SETTINGS, mix=Mix(on_policy=4, data=0, replay=1), replay_tilt=1.0)
"""Replayed in proportion to r, prior draws of any beta would be near that beta's target; betas of
larger Z come up more often.
"""

OBSERVATIONS, RANKED, BINS = 200, 99, 10
COUNTED, DRAWS = 40, 1000
"""Observations, and draws of each, whose modes are counted."""

BETAS = (0.0, 0.5, 1.0, 1.5, 2.0)
MARGIN = 0.25
"""Trained on a range wider by this at both ends, where a network fits worst."""


def calibration(run: Run, effort: Effort, seed: int) -> list[Row]:
    """One posterior for every y of a linear observation: simulation-based calibration and errors.

    Of `OBSERVATIONS` pairs (x0, y), the rank of each coordinate of x0 among `RANKED` posterior
    draws given y is uniform when the posterior is right (arXiv 1804.06788). An exact posterior
    exceeds the bound of a coordinate in one seed of a hundred.
    """
    toy = observation_toy(seed)
    posterior, log_z = trained(run, "observations", toy, SETTINGS, effort, seed)
    generator = generator_for(seed, "evaluation")
    y, x0 = toy.task.draw_conditions(OBSERVATIONS, generator=generator)
    assert isinstance(y, Tensor) and x0 is not None and toy.task.draw_target is not None
    sampler = Sampler(toy.task.diffusion, posterior)
    ranked = calibration_p(x0, sampler.sample(y, RANKED, generator=generator))
    some = y[:COUNTED]
    draws = sampler.sample(some, DRAWS, generator=generator)
    exact = toy.task.draw_target(some, DRAWS, generator=generator)
    error = learned(log_z, y) - toy.log_z(y)
    return [
        row("every y: 0.01 / p of ranks, coordinate 1", seed, 0.01 / ranked[0], 1.0),
        row("every y: 0.01 / p of ranks, coordinate 2", seed, 0.01 / ranked[1], 1.0),
        row("every y: mean TV of mode weights", seed, toy.errors(draws, some)["tv"]),
        row("every y: the same of exact draws", seed, toy.errors(exact, some)["tv"]),
        row("every y: mean |learned log Z error|", seed, float(error.abs().mean())),
    ]


def temperature(run: Run, effort: Effort, seed: int) -> list[Row]:
    """One posterior for every beta between 0 and 2, and its log Z(beta): errors at five betas."""
    toy = temperature_toy(seed)
    posterior, log_z = trained(run, "temperatures", toy, OVER_BETA, effort, seed)
    beta = torch.tensor(BETAS)[:, None]
    draws, weight = weighted_draws(
        toy, posterior, beta, 8 * DRAWS, generator=generator_for(seed, "evaluation")
    )
    weighted = (importance_log_z(weight)[0] - toy.log_z(beta)).abs()
    direct = (learned(log_z, beta) - toy.log_z(beta)).abs()
    rows = []
    for index, value in enumerate(BETAS):
        tv = toy.errors(draws[index : index + 1], beta[index : index + 1])["tv"]
        rows += [
            row(f"beta = {value}: TV of mode weights", seed, tv, 0.03),
            row(f"beta = {value}: |log Z error|", seed, float(weighted[index]), 0.02),
            row(f"beta = {value}: |learned log Z error|", seed, float(direct[index]), 0.02),
        ]
    return rows


def observation_toy(seed: int) -> Toy:
    """Four modes in two dimensions, of which one direction is measured."""
    generator = generator_for(seed, "observations")
    mixture = random_mixture(2, MODES, generator=generator)
    operator, noise = random_observation(mixture, 1, generator=generator)
    return mixture_observation(
        mixture,
        operator,
        noise,
        levels=LEVELS,
        posterior=mixture_posterior(generator=generator),
        generator=generator,
    )


def temperature_toy(seed: int) -> Toy:
    """Four modes in two dimensions, tilted at any beta between 0 and 2."""
    generator = generator_for(seed, "temperatures")
    mixture = random_mixture(2, MODES, generator=generator)
    return mixture_tilt_over_beta(
        mixture,
        random_tilt(mixture, generator=generator),
        BETAS[0] - MARGIN,
        BETAS[-1] + MARGIN,
        levels=LEVELS,
        posterior=mixture_posterior(generator=generator),
        generator=generator,
    )


def trained(
    run: Run, name: str, toy: Toy, settings: FinetuneSettings, effort: Effort, seed: int
) -> tuple[nn.Module, ConditionalLogZ]:
    """The posterior and log Z of every condition, a number."""
    generator = generator_for(seed, name, "log_z")
    network = MLP(1, 1, width=64, generator=generator)
    log_z = ConditionalLogZ(network)
    standardise(toy, network, generator=generator)
    updates = effort.amortised_updates
    posterior = fit_toy(
        run.stage(name, {"seed": seed, "updates": updates}),
        toy,
        replace(settings, updates=updates),
        seed=seed,
        log_z=log_z,
        objective=rtb(huber(3.0)),
    )
    return posterior, log_z


def standardise(toy: Toy, network: MLP, *, generator: Generator) -> None:
    """Tell the posterior's network and log Z's the mean and spread of the conditions."""
    condition, _ = toy.task.draw_conditions(4096, generator=generator)
    assert isinstance(condition, Tensor)
    network.standardise(condition)
    for part in toy.task.posterior.modules():
        if isinstance(part, ResidualMLP):
            part.standardise(condition)


@torch.no_grad()
def learned(log_z: ConditionalLogZ, condition: Tensor) -> Tensor:
    """What the network says log Z is, nats: [rows]."""
    return log_z(condition, torch.zeros(len(condition))).double()


def weighted_draws(
    toy: Toy, posterior: nn.Module, condition: Tensor, n: int, *, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Posterior draws [rows, n, size] and the log-weights of their paths [rows, n]."""
    task, rows = toy.task, len(condition)
    each = conditions.repeat(condition, n)
    path, ratio = rollout_against(
        task.diffusion, posterior, task.prior, each, rows * n, generator=generator
    )
    weight = log_weight(task.log_reward(path.x0, each), ratio, 1.0)
    return path.x0.reshape(rows, n, -1), weight.double().reshape(rows, n)


def calibration_p(x0: Tensor, draws: Tensor) -> list[float]:
    """For each coordinate, the p value of its ranks being uniform, in `BINS` equal bins.

    `x0`: [rows, size]; `draws`: [rows, n, size], n + 1 divisible by `BINS`.
    """
    ranks = (draws < x0[:, None]).sum(1)
    bins = ranks * BINS // (draws.shape[1] + 1)
    counts = nn.functional.one_hot(bins, BINS).sum(0)
    return [chi_square_p(count) for count in counts]


def chi_square_p(counts: Tensor) -> float:
    """The p value of counts [bins] under equal chances, by Pearson's chi-square; at least 1e-12."""
    counts = counts.double()
    expected = counts.mean()
    statistic = ((counts - expected).square() / expected).sum()
    freedom = torch.tensor(len(counts) - 1.0, dtype=torch.float64)
    return max(float(torch.special.gammaincc(freedom / 2, statistic / 2)), 1e-12)
