"""Baselines for image posteriors, on the prior, the reward and the reference of another run.

    rtb-rl run image_baselines --share runs/even --target even --out runs/even-baselines

Training-free: best_of_n, importance resampling, DPS, LGD-MC, twisted SMC, FK steering. Trained:
DDPO, DPOK, adjoint matching. Each may spend as many network calls a draw as the run of rtb_image
that it shares, training included; a backward pass counts as two calls. Guidance can't use as many
and spends less: the table has what was counted.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Generator

from rtb_rl import InputError
from rtb_rl.baselines import (
    AdjointMatching,
    BaselineSettings,
    ClippedDdpo,
    Ddpo,
    Dpok,
    Draws,
    PolicyGradient,
    best_of_n,
    dps,
    fk_steering,
    importance_resampling,
    lgd_mc,
    noised_logits_guidance,
    published_dpok,
    twisted_smc,
)
from rtb_rl.tasks.image import ImageJob, ImageSettings, fit_posterior, open_image_job, to_images
from rtb_rl.tasks.image.posterior import PosteriorSettings
from rtb_rl.training import Task, generator_for


@dataclass(frozen=True)
class Settings(ImageSettings):
    """Baselines for image posteriors."""

    methods: tuple[str, ...] = ()
    """Those to run; not given: all of them."""


@dataclass(frozen=True)
class Budget:
    """What a method may spend."""

    calls: float
    """Network calls for each delivered draw."""
    draws: int
    """Draws delivered for each condition."""
    levels: int


def importance(*parts: Any, budget: Budget, generator: Generator) -> Draws:
    candidates = max(budget.draws, int(budget.calls * budget.draws / budget.levels))
    return importance_resampling(*parts, candidates=candidates, generator=generator)


def best(*parts: Any, budget: Budget, generator: Generator) -> Draws:
    candidates = max(2, int(budget.calls / budget.levels))
    return best_of_n(*parts, candidates=candidates, generator=generator)


def swarm(method: Callable[..., Draws], price: int, *parts: Any, budget: Budget, **given: Any):
    """One population as large as the budget allows, at `price` calls a level; as many of it as are
    asked for.
    """
    *model, draws = parts
    particles = max(draws, int(budget.calls * draws / (price * budget.levels)))
    found = method(*model, particles, particles=particles, **given)
    rows = found.x0 if parts[3] is None else found.x0.transpose(0, 1)
    kept = rows[:: particles // draws][:draws]
    return replace(
        found,
        x0=kept if parts[3] is None else kept.transpose(0, 1),
        calls=found.calls * particles / draws,
    )


def unlimited(method: Callable[..., Draws], *parts: Any, budget: Budget, **given: Any) -> Draws:
    return method(*parts, **given)
