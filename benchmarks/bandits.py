"""Contextual bandits with closed-form posteriors, through the offline-RL code path.

    rtb-rl bench bandits --out runs/bandits

Data of one-step episodes, a prior fitted to it, a critic given in closed form, a posterior fitted
with relative trajectory balance; then the moments of its draws against the formulas. Prior N(m(s),
v) and Q = -(c/2)(a - g(s))^2 give precision 1/v + beta c and mean (m/v + beta c g)/(1/v + beta c);
a mixture and a Q constant on each mode give weights w_k exp(beta Q_k).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from rtb_rl.rl import (
    ActionDiffusion,
    ActionNetwork,
    Critic,
    PosteriorSettings,
    TransitionDataset,
    fit_posterior,
    fit_prior,
    load_dataset,
)
from rtb_rl.training import FinetuneSettings, Mix, PretrainSettings, Run, write_rows


@dataclass(frozen=True)
class Settings:
    """Bandits with closed-form posteriors."""

    out: Path = Path("runs/bandits")
    fast: bool = False
    """Fewer updates and wider bounds."""
    seeds: int = 1


BETA = 2.0
SPREAD = 0.15
STIFFNESS = 1 / (BETA * SPREAD**2)  # halves the variance
CENTRES = torch.tensor([-0.6, 0.0, 0.6])
WIDTH = 0.06
MODE_VALUES = torch.tensor([0.5, -0.25, 0.0])


class QuadraticCritic:
    """Q(s, a) = -(c/2) |a - g(s)|^2 with g(s) = 0.3 - 0.2 s."""

    def q(self, observation: Tensor, action: Tensor) -> Tensor:
        goal = 0.3 - 0.2 * observation
        return -STIFFNESS / 2 * (action - goal).square().sum(1)


class ModeCritic:
    """Q(s, a) of the nearest centre; the first context swaps the outer values."""

    def q(self, observation: Tensor, action: Tensor) -> Tensor:
        mode = (action - CENTRES).abs().argmin(1)
        swapped = MODE_VALUES.flip(0)[mode]
        return torch.where(observation[:, 0] > 0, MODE_VALUES[mode], swapped)


def one_step_data(observations: Tensor, actions: Tensor, name: str) -> TransitionDataset:
    """Every transition an episode; rewards are not used."""
    count = len(observations)
    return load_dataset(
        {
            "observations": observations.numpy(),
            "actions": actions.numpy(),
            "rewards": torch.zeros(count).numpy(),
            "terminals": torch.ones(count, dtype=torch.bool).numpy(),
            "timeouts": torch.zeros(count, dtype=torch.bool).numpy(),
        }
    )


def gaussian_data(count: int, generator: torch.Generator) -> TransitionDataset:
    s = torch.rand((count, 1), generator=generator) * 2 - 1
    a = 0.3 * s + SPREAD * torch.randn((count, 1), generator=generator)
    return one_step_data(s, a.clamp(-1, 1), "gaussian-bandit")


def mixture_data(count: int, generator: torch.Generator) -> TransitionDataset:
    s = torch.randint(0, 2, (count, 1), generator=generator).float() * 2 - 1
    mode = torch.randint(0, 3, (count,), generator=generator)
    a = CENTRES[mode, None] + WIDTH * torch.randn((count, 1), generator=generator)
    return one_step_data(s, a.clamp(-1, 1), "mixture-bandit")


def fit(
    settings: Settings,
    name: str,
    data: TransitionDataset,
    critic: Critic,
    seed: int,
    *,
    levels: int,
) -> ActionDiffusion:
    """Prior, then posterior, as the main job fits them."""
    out = settings.out / f"{name}-{seed}"
    network = ActionNetwork(levels=10 if settings.fast else levels, width=64)
    pretrain = PretrainSettings(steps=1200 if settings.fast else 6000, batch=512)
    prior = fit_prior(out / "prior", data, pretrain, network, seed=seed)
    finetune = FinetuneSettings(
        updates=300 if settings.fast else 1500,
        beta=BETA,
        beta_warmup=50,
        conditions=32,
        mix=Mix(on_policy=7, data=1),
        levels_per_path=min(10, network.levels),
        average_decay=0.995,
    )
    return fit_posterior(
        out / "posterior", data, prior, critic, PosteriorSettings(finetune), seed=seed
    )


def gaussian_errors(settings: Settings, seed: int) -> Iterator[tuple[str, float, float]]:
    """(case, relative error, bound) of posterior mean and variance."""
    generator = torch.Generator().manual_seed(seed)
    data = gaussian_data(100_000, generator)
    posterior = fit(settings, "gaussian", data, QuadraticCritic(), seed, levels=20)
    s = torch.linspace(-0.9, 0.9, 19)[:, None]
    draws = posterior.sampler.sample(s, 20_000, generator=generator)[:, :, 0]
    precision = 1 / SPREAD**2 + BETA * STIFFNESS
    mean = (0.3 * s / SPREAD**2 + BETA * STIFFNESS * (0.3 - 0.2 * s)) / precision
    bound = 0.15 if settings.fast else 0.02
    shift = (draws.mean(1) - mean[:, 0]).abs().mean() / (1 / math.sqrt(precision))
    yield "gaussian mean, in posterior standard deviations", float(shift), 5 * bound
    moved = (draws.mean(1) - mean[:, 0]).abs().mean() / (mean[:, 0] - 0.3 * s[:, 0]).abs().mean()
    yield "gaussian mean, relative to its shift from the prior", float(moved), bound
    variance = (draws.var(1) * precision).mean() - 1
    yield "gaussian variance, relative", float(variance.abs()), bound


def mixture_errors(settings: Settings, seed: int) -> Iterator[tuple[str, float, float]]:
    """(case, total variation, bound) of the mode weights in both contexts."""
    generator = torch.Generator().manual_seed(seed)
    data = mixture_data(100_000, generator)
    posterior = fit(settings, "mixture", data, ModeCritic(), seed, levels=120)
    for context, values in ((1.0, MODE_VALUES), (-1.0, MODE_VALUES.flip(0))):
        draws = posterior.sampler.sample(torch.tensor([[context]]), 100_000, generator=generator)
        modes = (draws[0] - CENTRES).abs().argmin(1)
        weights = torch.bincount(modes, minlength=3) / len(modes)
        distance = (weights - (BETA * values).softmax(0)).abs().sum() / 2
        yield (
            f"mixture weights, context {context:+.0f}, total variation",
            float(distance),
            (0.05 if settings.fast else 0.02),
        )


def main(settings: Settings) -> None:
    """Fit both bandits for every seed and write one row a case."""
    run = Run(settings.out, {"fast": settings.fast, "seeds": settings.seeds})
    rows = []
    for seed in range(settings.seeds):
        for errors in (gaussian_errors, mixture_errors):
            for case, value, bound in errors(settings, seed):
                rows.append({"case": case, "seed": seed, "value": value, "bound": bound})
    write_rows(run, rows)


if __name__ == "__main__":
    main(tyro.cli(Settings))
