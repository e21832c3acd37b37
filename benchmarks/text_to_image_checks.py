"""What an update of a text-to-image posterior costs: few levels, many levels, the full size.

    rtb-rl bench text_to_image_checks --fast --out runs/text-to-image-checks-fast    a minute
    rtb-rl bench text_to_image_checks --out runs/text-to-image-checks    a few minutes of one core
    rtb-rl bench text_to_image_checks --only full_size --out runs/full-size    on a GPU

Three checks, on networks with random weights and a reward that costs nothing. `speed`: the gradient
of 8 of 50 levels against that of all. `memory`: an update's peak at 10 and at 100 levels.
`full_size`, on request alone: seconds and memory at the size of SD 1.5, with and without gradient
checkpointing. What is complete is not done again. Ends with rows.jsonl.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image.footprint import (
    Cost,
    Stopwatch,
    Work,
    costs_in_turn,
    new_finetuner,
    peak_of_updates,
)
from rtb_rl.tasks.text_to_image.random_pipelines import (
    SMALL,
    STABLE_DIFFUSION,
    Networks,
    random_pipeline,
)
from rtb_rl.training import Run, generator_for, write_rows
from rtb_rl.training.stage import device_for_training

SPEED = Work(levels=50, levels_per_path=8)
MEMORY = Work(levels_per_path=None, paths=2, chunk=2)
LEVELS = (10, 100)
"""Of the memory check."""
FULL_SIZE = "full_size"
CPU_PIXELS = 64
"""So many of a side are enough to see on a CPU that the full-size check works."""

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None}
CHOICES = ("out", "only", "allow_cpu")  # what a run may be continued with

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What an update of a text-to-image posterior costs."""

    out: Path = Path("runs/text-to-image-checks")
    fast: bool = False
    """Fewer levels, paths and repeats; the same bounds."""
    only: tuple[str, ...] = ()
    """Names of checks (speed, memory, full_size); not given: the first two."""
    repeats: int = 5
    """Updates that a median is taken of; one more comes first and doesn't count."""
    paths: int = 8
    """Of an update of full size."""
    chunk: int = 2
    """Steps of full size that have a graph at once; guidance makes two rows of each."""
    size: int = 512
    """Pixels of a side, of full size."""
    precision: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """That the U-Net of full size is evaluated in; its weights are float32."""
    allow_cpu: bool = False
    """Let the full-size check run without a GPU, with --size 64: to see that it works."""


def row(case: str, value: float, bound: float | None = None) -> Row:
    return {"case": case, "seed": 0, "value": float(value), "bound": bound}


def speed_rows(settings: Settings) -> list[Row]:
    """Some levels against all, update by update in turn on the same machine."""
    work, repeats = SPEED, settings.repeats
    if settings.fast:
        work, repeats = replace(SPEED, levels=10, levels_per_path=2, paths=2), 1
    costs = some_and_all(SMALL, work, repeats)
    some, every = costs.values()
    return [
        *(row(f"speed: {n}: {k}", v) for n, cost in costs.items() for k, v in seconds(cost)),
        row("speed: ratio of the gradients", some.gradient / every.gradient, 0.3),
        row("speed: ratio of the updates", some.seconds / every.seconds),
    ]


def some_and_all(networks: Networks, work: Work, repeats: int) -> dict[str, Cost]:
    """Costs of an update with `levels_per_path` of the levels and with all, by name."""
    gc.collect()  # an earlier pipeline isn't to count as memory of this one
    generator = generator_for(0, "networks", device=device_for_training())
    pipeline = random_pipeline(networks, generator=generator)
    works = {
        f"{work.levels_per_path} of {work.levels} levels": work,
        f"all {work.levels} levels": replace(work, levels_per_path=None),
    }
    watches = {name: Stopwatch(new_finetuner(pipeline, one)) for name, one in works.items()}
    return costs_in_turn(watches, repeats)


def seconds(cost: Cost) -> list[tuple[str, float]]:
    return [
        ("seconds of an update", cost.seconds),
        ("seconds of its drawing", cost.drawing),
        ("seconds of its gradient", cost.gradient),
    ]


def memory_rows(settings: Settings) -> list[Row]:
    """The peak at few and at many levels, all of them with a gradient; paths included."""
    levels, device = (5, 20) if settings.fast else LEVELS, device_for_training()
    few, many = (
        peak_of_updates(SMALL, replace(MEMORY, levels=number), device) for number in levels
    )
    before = peak_of_updates(SMALL, replace(MEMORY, levels=levels[0]), device, updates=0)
    return [
        row("memory: MiB before an update", before),
        row(f"memory: MiB, {levels[0]} levels", few),
        row(f"memory: MiB, {levels[1]} levels", many),
        row(f"memory: {levels[1]} levels over {levels[0]}, less 1", many / few - 1, 0.1),
    ]


def full_size_rows(settings: Settings) -> list[Row]:
    """Updates of full size; on a CUDA device their peak of memory as well, weights included."""
    work = Work(
        paths=settings.paths,
        chunk=settings.chunk,
        draw_batch=settings.paths,
        pixels=settings.size,
        precision=PRECISIONS[settings.precision],
    )
    repeats, rows = settings.repeats, []
    if settings.fast:
        work, repeats = replace(work, levels=3, levels_per_path=1, paths=1), 1
    for checkpointing in (False, True):
        chosen = replace(work, gradient_checkpointing=checkpointing)
        name = "checkpointing" if checkpointing else "no checkpointing"
        run = Run(settings.out / FULL_SIZE / name.replace(" ", "-"), asdict(chosen))
        if run.results is None:
            costs = some_and_all(STABLE_DIFFUSION, chosen, repeats)
            run.finish({levels: asdict(cost) for levels, cost in costs.items()})
        for levels, found in (run.results or {}).items():
            cost, case = Cost(**found), f"full size, {settings.size} px, {name}, {levels}"
            rows += [row(f"{case}: {key}", value) for key, value in seconds(cost)]
            if cost.peak is not None:
                rows.append(row(f"{case}: peak, MiB", cost.peak))
    return rows


CHECKS: Mapping[str, Callable[[Settings], list[Row]]] = {
    "speed": speed_rows,
    "memory": memory_rows,
    FULL_SIZE: full_size_rows,
}


def chosen_checks(settings: Settings) -> tuple[str, ...]:
    """The names of the checks to run; InputError for one that there is not or that can't be."""
    if unknown := [name for name in settings.only if name not in CHECKS]:
        raise InputError(f"no check {', '.join(unknown)}; the checks are {', '.join(CHECKS)}")
    small = settings.allow_cpu and settings.size <= CPU_PIXELS
    if FULL_SIZE in settings.only and device_for_training().type == "cpu" and not small:
        raise InputError(
            f"the full-size check of {settings.size} x {settings.size} pixels needs a GPU, and"
            " there is none here; run it where there is one, or see that it works with --allow-cpu"
            f" --size {CPU_PIXELS} --fast"
        )
    return settings.only or tuple(name for name in CHECKS if name != FULL_SIZE)


def main(settings: Settings) -> None:
    """Run the checks, then write their rows."""
    names = chosen_checks(settings)
    given = {name: value for name, value in asdict(settings).items() if name not in CHOICES}
    run, rows = Run(settings.out, given), []
    for name in names:
        done = run.stage(name, {"check": name, **given})
        if done.results is None:
            done.finish({"rows": CHECKS[name](settings)})
        rows += (done.results or {})["rows"]
    write_rows(run, rows)


if __name__ == "__main__":
    main(tyro.cli(Settings))
