"""Baselines for image posteriors, on the prior, the reward and the reference of another run.

    rtb-rl run image_baselines --share runs/even --target even --out runs/even-baselines

Training-free: best_of_n, importance resampling, DPS, LGD-MC, twisted SMC, FK steering. Trained:
DDPO, DPOK, adjoint matching. Each may spend as many network calls a draw as the run of rtb_image
that it shares, training included; a backward pass counts as two calls. Guidance can't use as many
and spends less: the table has what was counted.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from safetensors.torch import load, save
from torch import Generator, Tensor

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
from rtb_rl.baselines.surrogates import Surrogate
from rtb_rl.tasks.image import (
    ImageJob,
    ImageSettings,
    ImageTarget,
    PosteriorSettings,
    fit_posterior,
    open_image_job,
    posterior_task,
    to_images,
)
from rtb_rl.training import NetworkCalls, Task, generator_for
from rtb_rl.training.checkpoint import replace_file


@dataclass(frozen=True)
class Settings(ImageSettings):
    """Baselines for image posteriors."""

    methods: tuple[str, ...] = ()
    """Those to run, by the names in the table; not given: all of them."""


@dataclass(frozen=True)
class Budget:
    """What a method may spend: network calls for each delivered draw, draws for each condition."""

    calls: float
    draws: int
    levels: int

    def population(self, price: int) -> int:
        """Points that can be drawn for each delivered one, at `price` calls a level."""
        return max(1, int(self.calls / (price * self.levels)))


def best(*parts: Any, budget: Budget, **given: Any) -> Draws:
    return best_of_n(*parts, budget.draws, candidates=max(2, budget.population(1)), **given)


def importance(*parts: Any, budget: Budget, **given: Any) -> Draws:
    candidates = budget.draws * budget.population(1)
    return importance_resampling(*parts, budget.draws, candidates=candidates, **given)


def guidance(method: Callable[..., Draws], *parts: Any, budget: Budget, **given: Any) -> Draws:
    return method(*parts, budget.draws, **given)


def swarm(
    method: Callable[..., Draws], price: int, *parts: Any, budget: Budget, **given: Any
) -> Draws:
    """One population as large as the budget allows; as many of it as are asked for."""
    each = budget.population(price)
    particles = each * budget.draws
    found = method(*parts, particles, particles=particles, **given)
    x0 = found.x0[::each] if parts[-1] is None else found.x0[:, ::each]
    return replace(found, x0=x0, calls=found.calls * each)


def weak(job: ImageJob, *parts: Any, budget: Budget, beta: float, generator: Generator) -> Draws:
    """The published stand-in for DPS."""
    diffusion, denoiser, _, condition = parts
    return noised_logits_guidance(
        diffusion,
        denoiser,
        lambda x0, condition: job.classifier(to_images(x0)),
        condition,
        budget.draws,
        classes=job.labels or (),
        generator=generator,
    )


def training_free(job: ImageJob) -> dict[str, Callable[..., Draws]]:
    """Name -> method(diffusion, denoiser, log_reward, condition, budget=, beta=, generator=)."""
    methods = {
        "best of N": best,
        "importance resampling": importance,
        "DPS": partial(guidance, dps),
        "LGD-MC": partial(guidance, lgd_mc),
        "twisted SMC": partial(swarm, twisted_smc, 3),
        "FK steering": partial(swarm, fk_steering, 1),
    }
    published = {"DPS as published": partial(weak, job)} if job.labels else {}
    return methods | published


@dataclass(frozen=True)
class Train:
    """Makes a trainer with the settings of trajectory balance, as far as they apply."""

    name: str
    surrogate: Surrogate | None = None
    """Of a policy gradient; None: adjoint matching."""

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(
        self,
        task: Task,
        target: ImageTarget,
        settings: PosteriorSettings,
        generator: Generator,
        accelerator: Accelerator,
    ) -> PolicyGradient | AdjointMatching:
        tuned, groups = settings.finetune, 8 if target.is_conditional else 1
        chosen = BaselineSettings(
            updates=tuned.updates,
            beta=tuned.beta,
            conditions=groups,
            paths=tuned.conditions // groups,
            levels_per_path=tuned.levels_per_path,
            chunk=tuned.chunk,
            learning_rate=tuned.learning_rate,
            last_learning_rate=tuned.last_learning_rate,
            average_decay=tuned.average_decay,
        )
        if self.surrogate is None:
            return AdjointMatching(task, chosen, generator=generator)
        return PolicyGradient(task, chosen, surrogate=self.surrogate, generator=generator)


def trained(job: ImageJob) -> dict[str, Train]:
    """Name -> what makes the trainer."""
    methods = (
        Train("DDPO", Ddpo()),
        Train("DDPO, clipped", ClippedDdpo()),
        Train("DPOK, KL weight 1/beta", Dpok()),
        Train("DPOK, published weights", published_dpok(job.prior.diffusion)),
        Train("adjoint matching"),
    )
    return {method.name: method for method in methods}


def updates_within(job: ImageJob, method: Train, calls: float) -> int:
    """Updates that cost so many network calls, by the price of one on a copy."""
    settings, seed = job.budget.posterior, job.settings.seed
    task, unet = posterior_task(job.prior, job.target, settings, seed=seed)
    generator = generator_for(seed, "price", device=job.data.images.device)
    trainer = method(task, job.target, settings, generator, Accelerator())
    counted = NetworkCalls({job.prior.pipeline.unet, unet})
    trainer.update(0)
    counted.stop()
    return max(1, round(calls / counted.total))


def train_and_draw(
    job: ImageJob, method: Train, *, calls: float, draws: int, generator: Generator
) -> tuple[Draws, Mapping[str, Any]]:
    """A posterior trained for as many calls as trajectory balance was, and draws of it."""
    settings = job.budget.posterior
    updates = updates_within(job, method, calls)
    chosen = replace(settings, finetune=replace(settings.finetune, updates=updates))
    posterior = fit_posterior(
        job.run.directory / method.name.replace(" ", "_").replace("/", "_"),
        job.prior,
        job.target,
        chosen,
        seed=job.settings.seed,
        make_trainer=method,
    )
    x0 = posterior.sampler.sample(job.condition, draws, generator=generator)
    return Draws(x0, job.prior.diffusion.levels), posterior.results
'''.replace('','')


def main(settings: Settings) -> None:
    """Run the methods, skipping those that are complete, and compare them."""
    if settings.share is None:
        raise InputError("baselines stand on a run of rtb_image; name its directory with --share")
    path = settings.share / "results.json"
    if not path.exists():
        raise InputError(f"{settings.share} holds no finished run of rtb_image; finish it first")
    shared = json.loads(path.read_text())["methods"]["rtb"]
    job = open_image_job(settings, program="image_baselines")
    free, fitted = training_free(job), trained(job)
    names = settings.methods or (*free, *fitted)
    if unknown := set(names) - {*free, *fitted}:
        raise InputError(f"no method {sorted(unknown)}; there are {', '.join((*free, *fitted))}")
    levels, each = job.prior.diffusion.levels, job.draws_each
    budget = Budget(shared["training_calls"] / shared["draws"] + levels, each, levels)
    rows, samples = {}, {}
    for name in names:
        row, kept = job.directory / f"{name}.json", job.directory / f"{name}.safetensors"
        if not row.exists():
            generator, begun = generator_for(settings.seed, name), time.monotonic()
            ...
