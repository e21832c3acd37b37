"""Baselines for image posteriors, on the prior, the reward and the reference of another run.

    rtb-rl run image_baselines --share runs/even --target even --out runs/even-baselines

Training-free: best_of_n, importance resampling, DPS, LGD-MC, twisted SMC, FK steering. Trained:
DDPO, DPOK, adjoint matching. Each may spend as many network calls a draw as the run of rtb_image
that it shares, training included; a backward pass counts as two calls. Guidance can't use as many
and spends less: the table has what was counted.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import tyro
from accelerate import Accelerator
from rich.console import Console

from rtb_rl import InputError
from rtb_rl.tasks.image import (
    FREE,
    WEAK,
    Baseline,
    CallBudget,
    ImageJob,
    ImagePosterior,
    ImageSettings,
    fit_posterior,
    open_image_job,
    posterior_task,
    trained_baselines,
    training_free,
)
from rtb_rl.training import generator_for
from rtb_rl.training.equal_calls import Spent, check_same, spent_by, updates_within
from rtb_rl.training.settings import check_beta
from rtb_rl.training.table import slug


@dataclass(frozen=True)
class Settings(ImageSettings):
    """Baselines for image posteriors."""

    methods: tuple[str, ...] = ()
    """Those to run, by the names in the table; not given: all of them."""
    against: Path | None = None
    """Finished run of rtb_image on the same target, whose network calls each method may spend; not
    given: that of --share."""
    calls: float | None = None
    """Network calls that a training-free method may spend for each draw; not given: those that the
    shared run spent for each of its own."""
    learning_rate: float = 3e-4
    """Of the trained methods, which start at the prior; trajectory balance has its own."""


def updates(job: ImageJob, method: Baseline, calls: float) -> int:
    """Updates that cost so many network calls, by the price of one on a copy."""
    settings, seed = job.budget.posterior, job.settings.seed
    task, unet = posterior_task(job.prior, job.target, settings, seed=seed)
    generator = generator_for(seed, "price", device=job.data.images.device)
    new_trainer = partial(method, task, job.target, settings, generator, Accelerator())
    return updates_within(calls, new_trainer, {job.prior.pipeline.unet, unet})


def fit(job: ImageJob, method: Baseline, calls: float, rate: float) -> ImagePosterior:
    """A posterior trained for as many calls as trajectory balance was, at a rate of its own."""
    directory = job.run.directory / slug(method.name)
    settings = replace(job.budget.posterior, start=None)
    tuned = replace(settings.finetune, updates=updates(job, method, calls), learning_rate=rate)
    chosen = replace(settings, finetune=tuned)
    seed = job.settings.seed
    return fit_posterior(directory, job.prior, job.target, chosen, seed=seed, make_trainer=method)


def calls_of_rtb(settings: Settings) -> Spent:
    """Network calls that trajectory balance spent."""
    check_beta(settings.beta)
    check_beta(settings.learning_rate, "learning_rate")
    if settings.calls is not None:
        check_beta(settings.calls, "calls")
    run = settings.against or settings.share
    if run is None or settings.share is None:
        raise InputError("baselines stand on a run of rtb_image; name its directory with --share")
    asked = {"target": settings.target, "beta": settings.beta}
    spent = spent_by(run, "rtb", "rtb_image", asked)
    config = settings.share / "config.json"
    if config.exists():  # else the job says what is not there
        theirs, ours = (json.loads((one / config.name).read_text()) for one in (run, config.parent))
        for name in ("data_sha256", "prior"):
            check_same(run, name, theirs[name], ours[name])
        levels = [made["settings"]["prior"]["levels"] for made in (theirs, ours)]
        check_same(run, "levels", *levels)
    return spent


def chosen_methods(settings: Settings) -> tuple[str, ...]:
    """The names of what is run; InputError for a name that there is not."""
    published = () if settings.target == "each" else (WEAK,)
    known = (*FREE, *published, *trained_baselines())
    if unknown := [name for name in settings.methods if name not in known]:
        names = ", ".join(map(repr, known))
        raise InputError(f"there is no method {unknown[0]!r} for this target; there are {names}")
    return settings.methods or known


def main(settings: Settings) -> None:
    """Run the methods, skipping those that are complete, and compare them."""
    if Accelerator().num_processes > 1:
        raise InputError("the baselines train in one process; start them without a launcher")
    names = chosen_methods(settings)
    spent = calls_of_rtb(settings)
    job = open_image_job(settings, program="image_baselines", spent=spent)
    free, fitted = training_free(job.classifier, job.labels), trained_baselines()
    budget = CallBudget(settings.calls or spent.each, job.draws_each, job.prior.diffusion.levels)
    model = (job.prior.diffusion, job.prior.denoiser, job.target.log_reward, job.condition)

    for name in names:
        Console().print(f"[bold]{name}[/bold]")
        if name in fitted:
            posterior = fit(job, fitted[name], spent.training, settings.learning_rate)
            job.measure(name, partial(job.draw, posterior), posterior.results)
        else:
            method = partial(free[name], *model, budget=budget, beta=settings.beta)
            job.measure(name, lambda generator, method=method: method(generator=generator))
    job.finish(names)


if __name__ == "__main__":
    main(tyro.cli(Settings))
