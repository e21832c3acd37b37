"""Image posteriors against what is known of them: log Z, class masses, truths, and their memory.

    rtb-rl bench image_checks --fast --out runs/image-checks-fast    a few minutes on two cores
    rtb-rl bench image_checks --out runs/image-checks                an hour of one core, or less

Three checks. `exact`: smoothed digits of which log Z and class masses are known. `inverse`: one
posterior for all observations, its calibration and a table against training-free methods, on a
prior of the digits that is trained here or given as `--prior`. `memory`: an update's peak at 20 and
at 200 levels. What is complete is not done again. Ends with rows.jsonl and one table a problem.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from rtb_rl.adapters.pipelines import PipelinePrior
from rtb_rl.errors import InputError
from rtb_rl.tasks.image import (
    ImageDataset,
    PriorSettings,
    fit_prior,
    foreign_prior,
    load_images,
    prior_draws,
)
from rtb_rl.tasks.image.exact import ExactSettings, exact_problem, fit_exact
from rtb_rl.tasks.image.footprint import two_updates
from rtb_rl.tasks.image.inverse import InverseSettings, compare_methods
from rtb_rl.tasks.image.observations import markdown, measurements, observe
from rtb_rl.training import Run, generator_for, write_rows
from rtb_rl.training.memory import peak_memory

TARGETS = {"even": (0, 2, 4, 6, 8), "3": (3,)}
SIGMA = 0.3
"""Of the noise of observations, in model space."""
LEVELS = (20, 200)

CHOICES = ("out", "only", "problems")  # what a run may be continued with

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Image posteriors against what is known of them."""

    out: Path = Path("runs/image-checks")
    fast: bool = False
    """Less training, fewer observations and draws; the same bounds, which may then not hold."""
    only: tuple[str, ...] = ()
    """Names of checks (exact, inverse, memory); not given: all of them."""
    problems: tuple[str, ...] = ()
    """Inverse problems (inpainting, super-resolution, deblurring); not given: all of them."""
    prior: str | None = None
    """A diffusers pipeline of 8 x 8 digits for the inverse problems; not given: fitted here."""
    levels: int = 50
    """Denoising steps of the inverse problems."""
    half_precision: bool = False
    """Evaluate that prior and its posteriors in bfloat16."""
    seed: int = 0


def row(case: str, seed: int, value: float, bound: float | None = None) -> Row:
    return {"case": case, "seed": seed, "value": float(value), "bound": bound}


def exact_rows(settings: Settings) -> list[Row]:
    """The exact rung, one case a target."""
    data, bounds = load_images(), {"log_z_error": 0.05, "learned_log_z_error": 0.05, "tv": 0.03}
    given = exact_settings(settings.fast)
    rows = []
    for name, classes in TARGETS.items():
        config = {"case": name, "seed": settings.seed, "settings": asdict(given)}
        run = Run(settings.out / f"exact-{name}", config)
        problem = exact_problem(data, classes, given, seed=settings.seed)
        if run.results is None:
            run.finish(fit_exact(run, problem, given, seed=settings.seed))
        found = run.results or {}
        rows += [
            row(f"exact, {name}: {key}", settings.seed, value, bounds.get(key))
            for key, value in found.items()
        ]
    return rows


def exact_settings(fast: bool) -> ExactSettings:
    settings = ExactSettings()
    if not fast:
        return settings
    return replace(settings, draws=2000, finetune=replace(settings.finetune, updates=40))


def inverse_rows(settings: Settings) -> list[Row]:
    """Inverse problems of digits, one case each; writes a table of each."""
    data, given = load_images(), inverse_settings(settings.fast)
    prior = digits_prior(settings, data)
    count = given.observations + given.pool
    draws = prior_draws(settings.out / "draws", prior, count, seed=settings.seed)
    truth, pool = draws[: given.observations], draws[given.observations :]
    rows = []
    known = measurements(data.shape, sigma=SIGMA)
    if unknown := [name for name in settings.problems if name not in known]:
        raise InputError(f"no problem {', '.join(unknown)}; there are {', '.join(known)}")
    for name in settings.problems or known:
        measurement = known[name]
        generator = generator_for(settings.seed, name, device=truth.device)
        observed = observe(measurement, truth, generator=generator)
        directory = settings.out / name
        table = compare_methods(directory, prior, observed, pool, given, seed=settings.seed)
        (directory / "table.md").write_text(markdown(table))
        for method, found in table.items():
            rows += method_rows(f"{name}, {method}", found, settings.seed)
    return rows


def method_rows(name: str, found: Mapping[str, float], seed: int) -> Iterator[Row]:
    """All that was found of a method; p of RTB's ranks must be above 0.01."""
    for key, value in found.items():
        if key.startswith("p of "):
            surprise = -math.log10(max(value, 1e-300))
            yield row(
                f"{name}: -log10 {key}", seed, surprise, 2.0 if name.endswith(", RTB") else None
            )
        else:
            yield row(f"{name}: {key}", seed, value)


def digits_prior(settings: Settings, data: ImageDataset) -> PipelinePrior:
    precision = torch.bfloat16 if settings.half_precision else None
    if settings.prior is not None:
        return foreign_prior(
            settings.prior, data.shape, levels=settings.levels, precision=precision
        )
    fitted = PriorSettings(levels=settings.levels, half_precision=settings.half_precision)
    if settings.fast:
        fitted = replace(fitted, pretrain=replace(fitted.pretrain, steps=500))
    return fit_prior(settings.out / "prior", data, fitted, seed=settings.seed)


def inverse_settings(fast: bool) -> InverseSettings:
    settings = InverseSettings()
    if not fast:
        return settings
    tuned = replace(settings.posterior.finetune, updates=5, conditions=4)
    return InverseSettings(
        observations=20,
        draws=4,
        pool=500,
        start=replace(settings.start, steps=100),
        posterior=replace(
            settings.posterior, finetune=tuned, diagnostic_rows=2, diagnostic_samples=8
        ),
    )


def memory_rows(settings: Settings) -> list[Row]:
    """Peak memory of a process with an update, at few and at many levels; paths included."""
    run = Run(settings.out / "memory", {"case": "memory"})
    if run.results is None:
        run.finish({str(levels): peak_memory(partial(two_updates, levels)) for levels in LEVELS})
    peaks = [(run.results or {})[str(levels)] for levels in LEVELS]
    return [
        *(row(f"memory: MiB, {n} levels", 0, peak) for n, peak in zip(LEVELS, peaks, strict=True)),
        row(f"memory: {LEVELS[1]} levels over {LEVELS[0]}", 0, peaks[1] / peaks[0], 1.1),
    ]


CHECKS: dict[str, Callable[[Settings], list[Row]]] = {
    "exact": exact_rows,
    "memory": memory_rows,
    "inverse": inverse_rows,
}


def main(settings: Settings) -> None:
    """Run the checks, then write their rows."""
    if unknown := [name for name in settings.only if name not in CHECKS]:
        raise InputError(f"no check {', '.join(unknown)}; the checks are {', '.join(CHECKS)}")
    given = {name: value for name, value in asdict(settings).items() if name not in CHOICES}
    run = Run(settings.out, given)
    chosen = [check for name, check in CHECKS.items() if not settings.only or name in settings.only]
    write_rows(run, [row for check in chosen for row in check(settings)])


if __name__ == "__main__":
    main(tyro.cli(Settings))
