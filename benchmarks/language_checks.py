"""Language posteriors against what is known: enumeration, a Markov chain, and how many masks stay.

    rtb-rl bench language_checks --fast --out runs/language-checks-fast    a minute or two
    rtb-rl bench language_checks --out runs/language-checks                half an hour of two cores

Three checks. `exact`: a transformer posterior of sequences that can be listed. `markov`: prior and
posterior of gaps in sequences of a known Markov chain, whose log Z and token marginals follow by
forward and backward sums. `masks`: the share of masks left after each step of six. What is complete
is not done again. Ends with rows.jsonl.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from rtb_rl.core import (
    FixedOrder,
    IndependentReveals,
    MaskedDiffusion,
    Sampler,
    linear_masking,
    rollout,
)
from rtb_rl.core.log_z import ScalarLogZ
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.tasks.language.markov import random_chain
from rtb_rl.tasks.language.markov_fit import (
    compare_with_truth,
    fit_average,
    fit_world_posterior,
    fit_world_prior,
)
from rtb_rl.tasks.language.markov_world import MarkovWorld, WorldSettings
from rtb_rl.tasks.toy import token_task
from rtb_rl.tasks.toy.transformer_posterior import TransformerPosterior
from rtb_rl.training import (
    Finetuner,
    FinetuneSettings,
    Mix,
    Run,
    generator_for,
    write_rows,
)
from rtb_rl.training.stage import complete

SIZES = ((3, 4, 1200), (4, 5, 3600), (5, 4, 1200))
"""Tokens, lengths and updates of the exact check."""
STEPS = 6

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Language posteriors against what is known of them."""

    out: Path = Path("runs/language-checks")
    fast: bool = False
    """Less training and fewer prompts; the same bounds, which may then not hold."""
    only: tuple[str, ...] = ()
    """Names of checks (exact, markov, masks); not given: all of them."""
    seed: int = 0


def row(case: str, seed: int, value: float | Tensor, bound: float | None = None) -> Row:
    return {"case": case, "seed": seed, "value": float(value), "bound": bound}


def exact_rows(settings: Settings) -> list[Row]:
    """One token a step in a fixed order, where a transformer can be the exact posterior."""
    tuned = FinetuneSettings(
        beta_warmup=30,
        conditions=1,
        mix=Mix(on_policy=192, prior=64, data=0),
        levels_per_path=None,
        learning_rate=2e-3,
        last_learning_rate=0.01,
        log_z_learning_rate=0.05,
        average_decay=0.99,
    )
    rows = []
    for vocabulary, length, updates in SIZES:
        tuned = replace(tuned, updates=40 if settings.fast else updates)
        name = f"exact-{vocabulary}-{length}"
        toy = token_task(
            vocabulary,
            length,
            FixedOrder(torch.randperm(length, generator=generator_for(settings.seed, name))),
            posterior=TransformerPosterior,
            generator=generator_for(settings.seed, name),
        )
        run = Run(settings.out / name, {"seed": settings.seed, **asdict(tuned)})
        log_z, generator = ScalarLogZ(), generator_for(settings.seed, name, "training")
        tuner = Finetuner(toy.task, log_z, tuned, generator=generator)

        def fit(tuner: Finetuner = tuner, run: Run = run, log_z: ScalarLogZ = log_z):
            seconds = fit_average(run, tuner, tuner.settings.updates, tuner.task.posterior)
            return {"seconds": seconds, "log_z": float(log_z.value.detach())}

        complete(run, toy.task.posterior, fit)
        found = run.results or {}
        tv = toy.task.evaluate(Sampler(toy.task.diffusion, toy.task.posterior))["tv"]
        error = abs(found["log_z"] - float(toy.log_z(None)))
        case = f"exact, V = {vocabulary}, L = {length}"
        rows.append(row(f"{case}: TV", settings.seed, tv, 0.01))
        rows.append(row(f"{case}: |log Z error|", settings.seed, error, 0.01))
        rows.append(row(f"{case}: seconds", settings.seed, found["seconds"]))
    return rows


def markov_rows(settings: Settings) -> list[Row]:
    """Gaps in sequences of a Markov chain; the prompts are new."""
    chosen, prompts, draws = WorldSettings(), 50, 1500
    if settings.fast:
        chosen = replace(
            chosen,
            levels=8,
            pretrain=replace(chosen.pretrain, steps=60),
            finetune=replace(chosen.finetune, updates=10),
        )
        prompts, draws = 10, 100
    seed = settings.seed
    chain = random_chain(20, concentration=0.35, generator=generator_for(seed, "chain"))
    world = MarkovWorld(chain)
    run = Run(settings.out / "markov", {"seed": seed, **asdict(chosen)})
    prior, prior_seconds = fit_world_prior(run, world, chosen, seed=seed)
    network, seconds = fit_world_posterior(run, world, prior, chosen, seed=seed)
    generator = generator_for(seed, "prompts")
    found = compare_with_truth(world, prior, network, prompts, draws, generator=generator)
    bounds = {"RTB: marginal TV": 0.05, "RTB: |log Z error|": 0.1}
    rows = [row(f"markov, {key}", seed, value, bounds.get(key)) for key, value in found.items()]
    rows.append(row("markov, prior: seconds", seed, prior_seconds))
    rows.append(row("markov, posterior: seconds", seed, seconds))
    return rows


def mask_rows(settings: Settings) -> list[Row]:
    """Masks left after each step; 1 - 1/6, ..., 0 where the reveal probability is exact.

    The code published with arXiv 2405.20971 leaves 24 % before it fills in all at once.
    """
    length, paths = 50, 400 if settings.fast else 4000
    diffusion = MaskedDiffusion(length, 3, IndependentReveals(linear_masking(STEPS), length))

    def uniform(x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        return torch.zeros(*x.shape, 3).log_softmax(-1)

    path = rollout(diffusion, uniform, None, paths, generator=generator_for(settings.seed, "masks"))
    left = (path.x == 3).double().mean((1, 2)).flip(0)[1:]
    wanted = 1 - torch.arange(1, STEPS + 1) / STEPS
    bound = 4 * 0.5 / (paths * length) ** 0.5  # four standard errors at most
    rows = [
        row(f"masks left after step {i + 1} of {STEPS}", settings.seed, value)
        for i, value in enumerate(left)
    ]
    error = (left - wanted).abs().max()
    return [*rows, row("masks left: largest error", settings.seed, error, bound)]


CHECKS: Mapping[str, Callable[[Settings], list[Row]]] = {
    "exact": exact_rows,
    "markov": markov_rows,
    "masks": mask_rows,
}


def main(settings: Settings) -> None:
    """Run the checks, then write their rows."""
    if unknown := [name for name in settings.only if name not in CHECKS]:
        raise InputError(f"no check {', '.join(unknown)}; the checks are {', '.join(CHECKS)}")
    given = {k: v for k, v in asdict(settings).items() if k not in ("out", "only")}
    run = Run(settings.out, given)
    chosen = [check for name, check in CHECKS.items() if not settings.only or name in settings.only]
    write_rows(run, [row for check in chosen for row in check(settings)])


if __name__ == "__main__":
    main(tyro.cli(Settings))
