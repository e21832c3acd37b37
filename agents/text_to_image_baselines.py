"""Baselines for text-to-image posteriors, on the prior, reward and reference of another run.

    rtb-rl run text_to_image_baselines --share runs/shapes --out runs/shapes-baselines

Training-free: best of N, importance resampling, FK steering. Trained: DDPO, DPOK, and adjoint
matching where the reward has a gradient. Each may spend as many network calls a draw as the run of
rtb_text_to_image that it shares, training included. A call is a row of the guided denoiser; a
backward pass counts as two.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from accelerate import Accelerator
from rich.console import Console

from rtb_rl import InputError
from rtb_rl.baselines import fk_steering
from rtb_rl.tasks.text_to_image import (
    Baseline,
    CallBudget,
    TextToImageJob,
    TextToImagePosterior,
    TextToImageSettings,
    best,
    fit_text_to_image,
    importance,
    open_text_to_image_job,
    swarm,
    text_to_image_task,
    trained_baselines,
)
from rtb_rl.tasks.text_to_image.finished import beta_of
from rtb_rl.tasks.text_to_image.job import prompts_of, reward_of
from rtb_rl.tasks.text_to_image.named_rewards import named_reward
from rtb_rl.tasks.text_to_image.rewards import is_differentiable
from rtb_rl.tasks.text_to_image.settings import budget_for
from rtb_rl.training import generator_for
from rtb_rl.training.equal_calls import Spent, check_same, spent_by, updates_within
from rtb_rl.training.settings import check_beta
from rtb_rl.training.table import slug

FREE = {
    "best of N": best,
    "importance resampling": importance,
    "FK steering": partial(swarm, fk_steering, 1),
}
NEEDS_GRADIENT = "adjoint matching"


@dataclass(frozen=True)
class Settings(TextToImageSettings):
    """Baselines for text-to-image posteriors."""

    methods: tuple[str, ...] = ()
    """Those to run, by the names in the table; not given: all that the reward allows."""
    against: Path | None = None
    """Finished run of rtb_text_to_image whose network calls each method may spend; not given: that
    of --share."""
    calls: float | None = None
    """Network calls that a training-free method may spend for each draw; not given: those that the
    shared run spent for each of its own."""
    learning_rate: float = 3e-4
    """Of the trained methods, which start at the prior; trajectory balance has its own."""
    lora_rank: int | None = None
    """Rank of the adapters; not given: 4, and for shapes all weights of a copy are trained."""


def updates(job: TextToImageJob, method: Baseline, calls: float) -> int:
    """Updates that cost so many network calls, by the price of one."""
    settings, seed = job.budget.posterior, job.settings.seed
    task, _ = text_to_image_task(job.prior, job.target, settings, seed=seed)
    generator = generator_for(seed, "price", device=job.draws.x0.device)
    given = (task, job.target, job.prior.prompts, settings, generator, Accelerator())
    return updates_within(calls, partial(method, *given), {job.prior.denoiser, task.posterior})


def fit(job: TextToImageJob, method: Baseline, calls: float, rate: float) -> TextToImagePosterior:
    """A posterior trained for as many calls as trajectory balance was, at a rate of its own."""
    settings = replace(job.budget.posterior, start=None)
    tuned = replace(settings.finetune, updates=updates(job, method, calls), learning_rate=rate)
    return fit_text_to_image(
        job.run.directory / slug(method.name),
        job.prior,
        job.target,
        replace(settings, finetune=tuned),
        seed=job.settings.seed,
        make_trainer=method,
    )


def calls_of_rtb(settings: Settings) -> Spent:
    """Network calls that trajectory balance spent."""
    check_beta(settings.beta)
    check_beta(settings.learning_rate, "learning_rate")
    if settings.calls is not None:
        check_beta(settings.calls, "calls")
    run = settings.against or settings.share
    if run is None or settings.share is None:
        raise InputError(
            "baselines stand on a run of rtb_text_to_image; name its directory with --share"
        )
    prompts, reward = list(prompts_of(settings).texts), reward_of(settings)
    asked = {"prior": settings.prior, "prompts": prompts, "reward": reward}
    asked |= {"negative": settings.negative, "size": settings.size}
    spent = spent_by(run, "rtb", "rtb_text_to_image", asked)
    theirs = json.loads((run / "config.json").read_text())
    check_same(run, "beta", beta_of(run), settings.beta)
    check_same(run, "ancestral", theirs.get("ancestral", False), settings.ancestral)
    budget = budget_for(settings.budget, settings.prior)
    for name in ("guidance", "levels"):
        given = getattr(settings, name)
        ours = getattr(budget, name) if given is None else given
        check_same(run, name, theirs["settings"][name], ours)
    return spent


def check_methods(settings: Settings) -> None:
    """InputError for a method that there is not, or not for this reward."""
    known = (*FREE, *trained_baselines())
    if unknown := [name for name in settings.methods if name not in known]:
        raise InputError(
            f"there is no method {unknown[0]!r}; there are {', '.join(map(repr, known))}"
        )
    reward = reward_of(settings)
    if NEEDS_GRADIENT in settings.methods and not is_differentiable(named_reward(reward)):
        raise InputError(
            f"{NEEDS_GRADIENT} needs a reward with a gradient, and {reward!r} has none; leave that"
            " method out"
        )


def all_methods(*, differentiable: bool) -> tuple[str, ...]:
    """The names of all that the reward allows."""
    known = (*FREE, *trained_baselines())
    return tuple(name for name in known if differentiable or name != NEEDS_GRADIENT)


def measure(
    job: TextToImageJob, name: str, budget: CallBudget, *, training: float, rate: float
) -> None:
    """Draw by the method of that name, trained first where it is, and add its row."""
    fitted = trained_baselines()
    if name in fitted:
        posterior = fit(job, fitted[name], training, rate)
        return job.add(name, partial(job.draw, posterior), posterior.results)
    model = (job.prior.diffusion, job.prior.denoiser, job.measure.log_reward, job.condition)
    given: dict[str, Any] = {"budget": budget, "beta": job.beta, "batch": job.budget.draw_batch}
    method = partial(FREE[name], *model, **given)
    return job.add(name, lambda generator: method(generator=generator))


def main(settings: Settings) -> None:
    """Run the methods, skipping those that are complete, and compare them."""
    if Accelerator().num_processes > 1:
        raise InputError("the baselines train in one process; start them without a launcher")
    spent = calls_of_rtb(settings)
    asked = settings.lora_rank is not None
    rank: dict[str, Any] = {"lora_rank": settings.lora_rank} if asked else {}
    check_methods(settings)
    job = open_text_to_image_job(settings, program="text_to_image_baselines", spent=spent, **rank)
    differentiable = job.measure.log_reward.differentiable
    names = settings.methods or all_methods(differentiable=differentiable)
    budget = CallBudget(settings.calls or spent.each, job.budget.draws, job.prior.diffusion.levels)
    for name in names:
        Console().print(f"[bold]{name}[/bold]")
        measure(job, name, budget, training=spent.training, rate=settings.learning_rate)
    job.finish(names)


if __name__ == "__main__":
    main(tyro.cli(Settings))
