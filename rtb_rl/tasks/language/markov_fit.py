"""Prior and posterior of gaps in a Markov chain's sequences, trained and held against truth."""

import copy
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    GroupMeanLogZ,
    OnDemand,
    conditions,
    importance_log_z,
    log_weight,
    rollout_against,
)
from rtb_rl.tasks.language.denoiser import TextPrior, fading
from rtb_rl.tasks.language.markov_world import MarkovWorld, WorldSettings, token_marginals
from rtb_rl.training.finetune import Finetuner
from rtb_rl.training.loop import train
from rtb_rl.training.pretrain import Pretrainer
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import complete

PATHS = 300  # of each prompt, for log Z
AT_ONCE = 2000
"""Paths drawn together: few enough that what they pass through fits a processor's cache, which
halves the time."""


def fit_world_prior(
    run: Run, world: MarkovWorld, settings: WorldSettings, *, seed: int
) -> tuple[TextPrior, float]:
    """The prior, trained in run/prior or loaded from it, and the seconds that took."""
    generator = generator_for(seed, "prior")
    prior = world.prior(settings, generator=generator)
    stage = run.stage("prior", asdict(settings.pretrain))

    def fit() -> dict[str, Any]:
        denoiser = OnDemand(prior.both_sides())
        given = (prior.diffusion, denoiser, world.examples, settings.pretrain)
        trainer = Pretrainer(*given, generator=generator)
        return {"seconds": fit_average(stage, trainer, settings.pretrain.steps, denoiser)}

    complete(stage, prior.network, fit)
    return prior, (stage.results or {})["seconds"]


def fit_world_posterior(
    run: Run, world: MarkovWorld, prior: TextPrior, settings: WorldSettings, *, seed: int
) -> tuple[nn.Module, float]:
    """The posterior's network, trained in run/posterior or loaded from it, and the seconds."""
    network = fading(copy.deepcopy(prior.network).requires_grad_(True), prior.frame.codec.pad)
    task, tuned = world.task(prior, network), settings.finetune
    stage = run.stage("posterior", asdict(tuned))

    def fit() -> dict[str, Any]:
        log_z, generator = GroupMeanLogZ(tuned.mix.total), generator_for(seed, "posterior")
        tuner = Finetuner(task, log_z, tuned, generator=generator)
        return {"seconds": fit_average(stage, tuner, tuned.updates, task.posterior)}

    complete(stage, network, fit)
    return network, (stage.results or {})["seconds"]


def fit_average(run: Run, trainer: Any, steps: int, module: nn.Module) -> float:
    """Train and put the averaged weights into the module; the seconds it took."""
    seconds = train(run, trainer.update, trainer.parts, steps=steps, description=run.directory.name)
    module.load_state_dict(trainer.average.module.state_dict())
    return seconds


def compare_with_truth(
    world: MarkovWorld,
    prior: TextPrior,
    network: nn.Module,
    prompts: int,
    draws: int,
    *,
    generator: Generator,
) -> dict[str, float]:
    """Token marginals and log Z of new prompts: means over them, for each denoiser."""
    condition, _ = world.draw(prompts, generator=generator)
    known, marginals = world.truth(condition)
    tokens = slice(1, 1 + world.chain.vocabulary)
    found = {}
    for name, denoiser in (
        ("prior", prior.left_only()),
        ("prompt (x, y)", prior.both_sides()),
        ("RTB", prior.both_sides(network)),
    ):
        paths = min(draws, PATHS)
        marginals_of = partial(
            token_marginals, prior.diffusion, denoiser, n=draws, generator=generator
        )
        weights_of = partial(path_weights, world, prior, denoiser, n=paths, generator=generator)
        told = few_at_once(marginals_of, condition, draws)[..., tokens]
        weights = few_at_once(weights_of, condition, paths)
        log_z = importance_log_z(weights)[0]
        found[f"{name}: marginal TV"] = float((told - marginals).abs().sum(-1).mean() / 2)
        found[f"{name}: |log Z error|"] = float((log_z - known).abs().mean())
        found[f"{name}: log Z - ELBO"] = float((known - weights.mean(1)).mean())
    return found


def few_at_once(measure: Callable[[Any], Tensor], condition: Any, paths: int) -> Tensor:
    """What is measured of a few rows of the condition at a time, each of so many paths."""
    rows = conditions.count(condition) or 1
    parts = conditions.split(condition, rows, max(1, AT_ONCE // paths))
    return torch.cat([measure(part) for part, _ in parts])


@torch.no_grad()
def path_weights(
    world: MarkovWorld,
    prior: TextPrior,
    denoiser: nn.Module,
    condition: Any,
    n: int,
    generator: Generator,
) -> Tensor:
    """Log-weights of paths of the denoiser: float64 [prompts, n]."""
    each = conditions.repeat(condition, n)
    rows = conditions.count(each) or n
    given = (prior.diffusion, OnDemand(denoiser), OnDemand(prior.left_only()), each, rows)
    path, ratio = rollout_against(*given, generator=generator)
    return log_weight(world.log_reward(path.x0, each), ratio.double(), 1.0).reshape(-1, n)
