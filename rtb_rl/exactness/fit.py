"""Training a toy's posterior, and what a case of the benchmark is made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rtb_rl.core import Sampler, ScalarLogZ
from rtb_rl.core.protocols import Objective
from rtb_rl.tasks.toy import Toy
from rtb_rl.training.diagnostics import diagnose
from rtb_rl.training.finetune import Finetuner
from rtb_rl.training.loop import train
from rtb_rl.training.mix import LearnedLogZ
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.settings import FinetuneSettings

CHUNK = 4000
"""Draws made at once."""

Row = dict[str, Any]
"""{case, seed, value, bound}: what was measured, and the largest value wanted, or None."""


@dataclass(frozen=True)
class Effort:
    """How much work the cases do."""

    nine_updates: int
    nine_seeds: int
    nine_draws: int
    nine_bounds: Mapping[str, float]
    """Of the 25 -> 9 toy; its weights are counted in so many draws."""
    controls: int
    control_updates: int
    """Seeds of its controls."""
    problems: int
    """Random mixtures of each size."""
    mixture_levels: tuple[int, ...]
    mixture_updates: tuple[int, ...]
    """For mixtures of 2, 8 and 32 dimensions."""
    line_levels: tuple[int, ...]
    line_updates: int
    """For the error against the number of levels."""
    token_updates: int
    floor_instances: int
    rare_mixes: tuple[str, ...]
    rare_updates: int
    amortised_updates: int


FAST = Effort(
    nine_updates=380,
    nine_seeds=3,
    nine_draws=20_000,
    nine_bounds={"tv": 0.05, "log_z": 0.05, "outside": 0.05, "variance": 0.2, "ess": 0.7},
    controls=0,
    control_updates=0,
    problems=1,
    mixture_levels=(30, 30, 30),
    mixture_updates=(200, 200, 100),
    line_levels=(10, 20),
    line_updates=400,
    token_updates=400,
    floor_instances=5,
    rare_mixes=("on-policy alone", "replay"),
    rare_updates=120,
    amortised_updates=200,
)
FULL = Effort(
    nine_updates=2400,
    nine_seeds=3,
    nine_draws=100_000,
    nine_bounds={"tv": 0.02, "log_z": 0.02, "outside": 0.01, "variance": 0.1, "ess": 0.5},
    controls=1,
    control_updates=400,
    problems=3,
    mixture_levels=(40, 60, 60),
    mixture_updates=(400, 600, 300),
    line_levels=(5, 10, 20, 50, 100),
    line_updates=800,
    token_updates=1000,
    floor_instances=20,
    rare_mixes=(
        "on-policy alone",
        "widened",
        "prior",
        "noised data",
        "replay",
        "prior and replay",
    ),
    rare_updates=160,
    amortised_updates=600,
)

Case = Callable[[Run, Effort, int], list[Row]]
"""(run of its own, effort, seed) -> rows."""


def row(case: str, seed: int, value: float, bound: float | None = None) -> Row:
    """One measurement."""
    return {"case": case, "seed": seed, "value": float(value), "bound": bound}


def fit_toy(
    run: Run,
    toy: Toy,
    settings: FinetuneSettings,
    *,
    seed: int,
    log_z: LearnedLogZ | None = None,
    objective: Objective | None = None,
    observe: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """The trained posterior denoiser of a toy (the average of its weights); resumable.

    `observe(step, posterior)` is called after every update.
    """
    finetuner = Finetuner(
        toy.task,
        log_z or ScalarLogZ(),
        settings,
        generator=generator_for(seed, "posterior"),
        objective=objective,
    )

    def update(step: int) -> Mapping[str, Tensor | float]:
        metrics = finetuner.update(step)
        if observe is not None:
            observe(step + 1, finetuner.average.module)
        return metrics

    train(
        run,
        update,
        finetuner.parts,
        steps=settings.updates,
        description=run.directory.name,
        log_every=20,
        checkpoint_every=500,
    )
    return finetuner.average.module


def found(
    toy: Toy, posterior: nn.Module, *, seed: int, draws: int = 20_000, counted: int = 20_000
) -> dict[str, float]:
    """Diagnostics from `draws` paths of a posterior without condition, errors of `counted` draws.

    "log_z_error" is that of the importance-weighted log Z against the exact one. "outside_bounds"
    is by how much the exact log Z leaves [ELBO, EUBO], each widened by three standard errors.
    """
    generator = generator_for(seed, "evaluation")
    sampler = Sampler(toy.task.diffusion, posterior)
    parts = [sampler.sample(None, CHUNK, generator=generator) for _ in range(counted // CHUNK)]
    values = diagnose(toy.task, posterior, 1.0, samples=draws, generator=generator)
    exact = float(toy.log_z(None)[0])
    lower = values["elbo"] - 3 * values["residual_std"] / draws**0.5
    upper = values["eubo"] + 3 * values["eubo_standard_error"]
    return {
        **toy.errors(torch.cat(parts), None),
        **values,
        "log_z_error": abs(values["log_z"] - exact),
        "outside_bounds": max(0.0, lower - exact, exact - upper),
    }
