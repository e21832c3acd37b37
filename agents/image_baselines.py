"""Baselines for image posteriors on the prior, the reward and the reference of another run.

    rtb-rl run image_baselines --share runs/even --target even --out runs/even-baselines

Training-free: best_of_n, importance resampling, DPS, LGD-MC, twisted SMC, FK steering. Trained:
DDPO, DPOK, adjoint matching. Each may spend as many network calls a draw as the run of rtb_image
that is shared, its training included (a backward pass counts as two calls); those that can't use
as many spend less, and the table says how many were counted.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from rtb_rl import InputError
from rtb_rl.baselines import (
    Draws,
)
from rtb_rl.tasks.image import ImageSettings, open_image_job


@dataclass(frozen=True)
class Settings(ImageSettings):
    """Baselines for image posteriors."""

    methods: tuple[str, ...] = ()
    """Those to run; not given: all that the target allows."""


Method = Callable[..., Draws]


def scaled(method: Method, option: str, price: float) -> Method:
    """The method with `option` as large as the budget allows, where one more costs `price`."""

    def run(*parts: Any, budget: float, generator: torch.Generator) -> Draws:
        return method(*parts, **{option: max(2, int(budget / price))}, generator=generator)

    return run


def main(settings: Settings) -> None:
    """Run the methods, skipping those that are complete, and compare them."""
    if settings.share is None:
        raise InputError("the baselines stand on a run of rtb_image; name it with --share")
    job = open_image_job(settings, program="image_baselines")
    shared = json.loads((settings.share / "results.json").read_text())["methods"]["rtb"]
    delivered = job.draws_each * len(job.references)
    budget = shared["training_calls"] / delivered + job.prior.diffusion.levels
    print(budget)


if __name__ == "__main__":
    main(tyro.cli(Settings))
