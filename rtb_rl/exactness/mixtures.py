"""Posteriors of Gaussian mixtures: 25 modes of which 9 stay, and random problems of any size."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from rtb_rl.core import (
    ResampledSampler,
    huber,
    kl_reinforce_loss,
    log_weight,
    published_rl_loss,
    rtb,
)
from rtb_rl.core.protocols import Objective
from rtb_rl.exactness.curve import Curve, save_draws
from rtb_rl.exactness.fit import Effort, Row, fit_toy, found, row
from rtb_rl.tasks.toy import (
    Toy,
    mixture_one_observation,
    mixture_posterior,
    mixture_tilt,
    nine_of_twenty_five,
    random_mixture,
    random_observation,
    random_tilt,
)
from rtb_rl.tasks.toy.mixture_tasks import measure
from rtb_rl.training.mix import Mix
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.settings import FinetuneSettings

SETTINGS = FinetuneSettings(
    beta_warmup=50,
    conditions=96,
    mix=Mix(on_policy=3, data=0, replay=1),
    replay_tilt=1.0,
    levels_per_path=None,
    chunk=1024,
    learning_rate=4e-3,
    last_learning_rate=0.02,
    log_z_learning_rate=0.05,
    average_decay=0.99,
)
"""On-policy paths beside replayed ones drawn in proportion to r: those keep every mode in sight."""

HUBER = huber(5.0)
SIZES = (2, 8, 32)
LOG_Z_BOUNDS = {2: 0.02, 8: 0.05, 32: 0.15}
NINE_LEVELS = 40


def nine_toy(seed: int) -> Toy:
    """25 -> 9 at 40 levels, with a posterior of width 128."""
    generator = generator_for(seed, "nine")
    maker = mixture_posterior(width=128, generator=generator)
    return nine_of_twenty_five(levels=NINE_LEVELS, posterior=maker, generator=generator)


def nine(run: Run, effort: Effort, seed: int) -> list[Row]:
    """25 -> 9 by trajectory balance."""
    toy = nine_toy(seed)
    settings = replace(SETTINGS, updates=effort.nine_updates)
    posterior = fit_toy(
        run.stage("rtb", {"seed": seed, "updates": effort.nine_updates}),
        toy,
        settings,
        seed=seed,
        objective=rtb(HUBER),
        observe=Curve(run, toy),
    )
    values = found(toy, posterior, seed=seed, counted=effort.nine_draws)
    save_draws(run, toy, posterior, seed=seed)
    return nine_rows(values, seed, effort.nine_bounds)


def nine_rows(values: Mapping[str, float], seed: int, bounds: Mapping[str, float]) -> list[Row]:
    """The rows of a 25 -> 9 posterior. Of exact draws 1.1 % lie outside 3 sigma."""
    excess = values["outside"] - 0.0111
    return [
        row("25 -> 9: TV of mode weights", seed, values["tv"], bounds["tv"]),
        row("25 -> 9: |log Z error|", seed, values["log_z_error"], bounds["log_z"]),
        row("25 -> 9: mass outside 3 sigma, less 0.011", seed, excess, bounds["outside"]),
        row(
            "25 -> 9: |within-mode variance / exact - 1|",
            seed,
            abs(values["variance_ratio"] - 1),
            bounds["variance"],
        ),
        row("25 -> 9: 1 - ESS", seed, 1 - values["ess"], bounds["ess"]),
        row("25 -> 9: log Z outside [ELBO, EUBO] by", seed, values["outside_bounds"], 0.0),
        row("25 -> 9: log Z - ELBO", seed, values["log_z"] - values["elbo"]),
    ]


def nine_controls(run: Run, effort: Effort, seed: int) -> list[Row]:
    """25 -> 9 by what reinforcement learning would do, on-policy: one is right, one can't be."""
    group = 4 * SETTINGS.conditions

    def reinforce(log_z: Tensor, log_ratio: Tensor, log_reward: Tensor, beta: float) -> Tensor:
        return kl_reinforce_loss(log_weight(log_reward, log_ratio, beta), group)

    def published(log_z: Tensor, log_ratio: Tensor, log_reward: Tensor, beta: float) -> Tensor:
        return published_rl_loss(log_ratio, log_reward, 0.5)

    objectives: dict[str, Objective] = {
        "RTB, on-policy alone": rtb(HUBER),
        "KL-REINFORCE on log r": reinforce,
        "published RL loss, w = 0.5": published,
    }
    rows = []
    settings = replace(SETTINGS, updates=effort.control_updates, mix=Mix(on_policy=4, data=0))
    for name, objective in objectives.items():
        toy = nine_toy(seed)
        stage = run.stage(name.split(",")[0].replace(" ", "_"), {"seed": seed, "name": name})
        posterior = fit_toy(stage, toy, settings, seed=seed, objective=objective)
        save_draws(stage, toy, posterior, seed=seed)
        values = found(toy, posterior, seed=seed)
        rows.append(row(f"25 -> 9, {name}: TV of mode weights", seed, values["tv"]))
        rows.append(row(f"25 -> 9, {name}: |log Z error|", seed, values["log_z_error"]))
    return rows


def random_mixtures(run: Run, effort: Effort, seed: int, *, size: int) -> list[Row]:
    """Tilts (even seeds) and observations (odd) of random mixtures."""
    kind = "observation" if seed % 2 else "tilt"
    index = SIZES.index(size)
    levels, updates = effort.mixture_levels[index], effort.mixture_updates[index]
    generator = generator_for(seed, "mixture", size)
    mixture = random_mixture(size, 6, generator=generator)
    maker = mixture_posterior(width=64, generator=generator)
    if kind == "tilt":
        slope = random_tilt(mixture, generator=generator)
        make: Callable[..., Toy] = partial(mixture_tilt, mixture, slope)
    else:
        operator, noise = random_observation(mixture, generator=generator)
        x0 = mixture.sample(1, generator=generator)
        y = measure(x0, operator, noise, generator=generator)[0]
        make = partial(mixture_one_observation, mixture, operator, noise, y)
    toy = make(levels=levels, posterior=maker, generator=generator)
    settings = replace(
        SETTINGS,
        updates=updates,
        conditions=48,
        levels_per_path=min(16, levels),
    )
    stage = run.stage("rtb", {"seed": seed, "updates": settings.updates, "levels": levels})
    posterior = fit_toy(stage, toy, settings, seed=seed, objective=rtb(HUBER))
    values = found(toy, posterior, seed=seed, draws=10_000, counted=12_000)
    name = f"mixture, d = {size}"
    return [
        row(f"{name}: TV of mode weights", seed, values["tv"], 0.03),
        row(f"{name}: |log Z error|", seed, values["log_z_error"], LOG_Z_BOUNDS[size]),
        row(f"{name}: log Z outside [ELBO, EUBO] by", seed, values["outside_bounds"], 0.0),
        row(f"{name}: 1 - ESS", seed, 1 - values["ess"]),
        row(f"{name}: TV after importance resampling", seed, resampled_tv(toy, posterior, seed)),
    ]


def resampled_tv(toy: Toy, posterior: nn.Module, seed: int, draws: int = 2000) -> float:
    """TV of mode weights of importance-resampled draws; NaN where too few are effective."""
    task = toy.task
    sampler = ResampledSampler(task.diffusion, posterior, task.prior, task.log_reward)
    try:
        x0 = sampler.sample(None, draws, generator=generator_for(seed, "resampled"))
    except ValueError:
        return float("nan")
    return toy.errors(x0, None)["tv"]
