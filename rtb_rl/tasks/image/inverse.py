"""Fitting the posterior of an inverse problem for all observations, and what competes with it."""

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Generator, Tensor

from rtb_rl.adapters.pipelines import PipelinePrior
from rtb_rl.adapters.schedulers import scheduler_grid
from rtb_rl.adapters.unets import denoiser_from_unet
from rtb_rl.baselines.draws import Draws
from rtb_rl.baselines.guidance import dps, lgd_mc
from rtb_rl.baselines.steering import twisted_smc
from rtb_rl.baselines.weighted import posterior_by_weight
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.tasks.image.measurements import OBSERVATION, digest, measurement_reward
from rtb_rl.tasks.image.observations import (
    Observed,
    judge,
    pool_draws,
    posterior_draws,
)
from rtb_rl.tasks.image.posterior import fit_posterior, posterior_task
from rtb_rl.tasks.image.target import ImageTarget, measurement_target
from rtb_rl.tasks.image.trainers import PosteriorSettings
from rtb_rl.training.calls import NetworkCalls
from rtb_rl.training.loop import train
from rtb_rl.training.mix import Mix
from rtb_rl.training.pretrain import Pretrainer, PretrainSettings
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.settings import FinetuneSettings
from rtb_rl.training.stage import complete, fingerprint
from rtb_rl.training.task import Task

Method = Callable[..., Draws]
"""(n, *, generator) -> `n` draws for every observation."""


GUIDED_CALLS = 3
"""Of the prior's network, a step of a guided path: one forward and one backward pass."""


@dataclass(frozen=True)
class InverseSettings:
    """How the posterior of an inverse problem is trained, and how much it is asked."""

    observations: int = 100
    draws: int = 12
    """For each observation."""
    pool: int = 8000
    """Prior draws that make the observations of training, and the reference by their weights."""
    start: PretrainSettings = field(
        default_factory=lambda: PretrainSettings(steps=3000, batch=64, average_decay=0.995)
    )
    posterior: PosteriorSettings = field(
        default_factory=lambda: PosteriorSettings(
            start=None,
            linex_limit=None,
            finetune=FinetuneSettings(
                updates=40,
                beta_warmup=1,
                conditions=32,
                mix=Mix(on_policy=1, data=1),
                levels_per_path=8,
                chunk=256,
                learning_rate=3e-5,
                last_learning_rate=0.1,
                average_decay=0.95,
            ),
            diagnostic_samples=50,
        )
    )


def denoising_start(
    directory: str | Path,
    prior: PipelinePrior,
    target: ImageTarget,
    settings: PretrainSettings,
    *,
    seed: int,
) -> tuple[ImageTarget, int]:
    """The target with a U-Net that knows its conditions already, and the network calls it took.

    The prior's U-Net, widened, is trained to denoise the target's data given their conditions: each
    is a draw of the posterior, so this is maximum likelihood; trajectory balance then needs to make
    up only for what few levels and steps leave. Resumable.
    """
    config = {"start": asdict(settings), "prior": fingerprint(prior.denoiser), "seed": seed}
    run = Run(directory, {**config, "target": target.name, **target.facts})
    unet = target.widen(prior.pipeline.unet).requires_grad_(True)
    scheduler, device = prior.pipeline.scheduler, prior.diffusion.signal.device
    grid = scheduler_grid(scheduler, prior.diffusion.levels)
    denoiser = denoiser_from_unet(
        unet, scheduler, grid, encode=target.encode, precision=prior.precision
    ).to(device)

    def draw(n: int, *, generator: Generator) -> tuple[Tensor, Condition]:
        condition, x0 = target.draw_conditions(n, generator=generator)
        assert x0 is not None
        return x0, condition

    def fit() -> dict[str, Any]:
        generator = generator_for(seed, "start", device=device)
        trainer = Pretrainer(prior.diffusion, denoiser, draw, settings, generator=generator)
        calls = NetworkCalls({unet})
        seconds = train(
            run,
            trainer.update,
            {**trainer.parts, "calls": calls},
            steps=settings.steps,
            description="start",
            checkpoint_every=200,
        )
        calls.stop()
        denoiser.load_state_dict(trainer.average.module.state_dict())
        return {"seconds": seconds, "network_calls": calls.total}

    complete(run, denoiser, fit)
    calls = (run.results or {})["network_calls"]
    return replace(target, widen=lambda _: copy.deepcopy(unet)), calls


def compare_methods(
    directory: str | Path,
    prior: PipelinePrior,
    observed: Observed,
    pool: Tensor,
    settings: InverseSettings,
    *,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Rows of `judge` for RTB, for the start that it was given, and for what needs no training.

    `pool`: prior draws [m, C, H, W], other than the truths. Every row is kept in the directory, and
    is not made again; InputError where it holds rows of something else, and for a beta other than
    1, which the truths know nothing of. "truth" has what is known of the posterior itself. "RTB, by
    weight" makes its draws with as many calls as guidance and steering do theirs, beside those of
    its training.
    """
    directory, count = Path(directory), settings.draws
    _check_beta(settings)
    target = measurement_target(observed.measurement, pool)
    started, start_calls = denoising_start(
        directory / "start", prior, target, settings.start, seed=seed
    )
    start, _ = posterior_task(prior, started, settings.posterior, seed=seed)
    fitted = fit_posterior(directory / "posterior", prior, started, settings.posterior, seed=seed)
    calls = start_calls + fitted.results["network_calls"]
    levels = prior.diffusion.levels
    free = training_free(prior, observed, particles=count)
    by_weight = partial(
        posterior_by_weight, fitted.task, observed.condition, paths=GUIDED_CALLS * count // 2
    )
    rows: dict[str, Callable[..., dict[str, float]]] = {
        "RTB": partial(judge_network, fitted.task, observed, count, calls),
        "RTB, by weight": partial(judge_method, by_weight, observed, count),
        "denoising start": partial(judge_network, start, observed, count, start_calls),
        **{name: partial(judge_method, method, observed, count) for name, method in free.items()},
        "prior draws by weight": partial(
            judge_method, partial(pool_draws, pool, levels, observed), observed, count
        ),
    }
    device = prior.diffusion.signal.device
    config = _config(prior, target, observed, settings, seed)
    truth = float(observed.log_likelihood(observed.truth[:, None]).mean())
    found = {"truth": {"log_likelihood": truth}}
    for name, row in rows.items():
        own = generator_for(seed, name, device=device)
        found[name] = _kept(directory / "rows", config, name, partial(row, generator=own))
    return found


def judge_network(
    task: Task, observed: Observed, n: int, training_calls: int, *, generator: Generator
) -> dict[str, float]:
    """The row of a network that has learned the posterior, with its ELBO."""
    draws, bound = posterior_draws(task, observed.condition, n, generator=generator)
    row = judge(draws, observed, generator=generator)
    return row | {"elbo": bound, "training_calls": training_calls}


def judge_method(
    method: Method, observed: Observed, n: int, *, generator: Generator
) -> dict[str, float]:
    """The row of a method that is no network."""
    return judge(method(n, generator=generator), observed, generator=generator)


def training_free(prior: PipelinePrior, observed: Observed, *, particles: int) -> dict[str, Method]:
    """Guidance and steering at their defaults; twisted SMC in populations of `particles`."""
    reward = measurement_reward(observed.measurement)
    model = (prior.diffusion, prior.denoiser, reward, observed.condition)
    return {
        "DPS": partial(dps, *model),
        "LGD-MC": partial(lgd_mc, *model),
        "twisted SMC": partial(twisted_smc, *model, particles=particles),
    }


def _check_beta(settings: InverseSettings) -> None:
    if (beta := settings.posterior.finetune.beta) != 1:
        raise InputError(
            f"the posterior's beta is {beta}, and truths, guidance and weights are of beta 1; give"
            " beta 1"
        )


def _config(
    prior: PipelinePrior,
    target: ImageTarget,
    observed: Observed,
    settings: InverseSettings,
    seed: int,
) -> dict[str, Any]:
    """What a row belongs to."""
    return {
        "prior": fingerprint(prior.denoiser),
        "settings": asdict(settings),
        "truth": digest(observed.truth),
        "observation": digest(observed.condition[OBSERVATION]),
        "seed": seed,
        **target.facts,
    }


def _kept(
    directory: Path, config: dict[str, Any], name: str, row: Callable[[], dict[str, float]]
) -> dict[str, float]:
    run = Run(directory / name.replace(" ", "-"), {"method": name, **config})
    if run.results is None:
        begun = time.monotonic()
        found = row()
        run.finish({**found, "seconds": time.monotonic() - begun})
    return run.results or {}
