"""What several seeds trained as one batched network cost, as a multiple of one seed.

    rtb-rl bench seeds_at_once --out runs/seeds-at-once

One update of prior, critic and posterior on HalfCheetah shapes, one seed and five in turn; medians
of the ratios of neighbours. `cpu`: seconds of the processor, which say less of what else the
machine does. The bound is 3.5 on two cores.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from rtb_rl.core import rtb
from rtb_rl.rl import (
    ActionDiffusion,
    ActionNetwork,
    CriticSettings,
    IQLCritic,
    PosteriorSettings,
    TransitionDataset,
    load_dataset,
    posterior_model,
)
from rtb_rl.rl.posteriors.posterior import new_log_z
from rtb_rl.rl.posteriors.prior import draw_actions
from rtb_rl.rl.seeds.finetuning import SeedFinetuner
from rtb_rl.rl.seeds.runs import Generators
from rtb_rl.rl.seeds.task import seed_task
from rtb_rl.rl.seeds.training import SeedIQL, SeedPretrainer
from rtb_rl.training import PretrainSettings, Run, generator_for, write_rows

OBSERVATION, ACTION, ROWS = 17, 6, 50_000
SEEDS, BOUND = 5, 3.5

Update = Callable[[int], object]


@dataclass(frozen=True)
class Settings:
    """Cost of several seeds at once."""

    out: Path = Path("runs/seeds-at-once")
    threads: int = 1
    """Of torch."""
    fast: bool = False
    """A few repeats only."""


def synthetic_data() -> TransitionDataset:
    """Transitions of HalfCheetah's shapes, drawn once."""
    random = np.random.default_rng(0)
    ends = np.arange(ROWS) % 1000 == 999
    return load_dataset(
        {
            "observations": random.standard_normal((ROWS, OBSERVATION), dtype=np.float32),
            "actions": random.uniform(-1, 1, (ROWS, ACTION)).astype(np.float32),
            "rewards": random.standard_normal(ROWS, dtype=np.float32),
            "terminals": np.zeros(ROWS, dtype=bool),
            "timeouts": ends,
        }
    )


def generators(count: int) -> Generators:
    return Generators([generator_for(seed, "seeds at once") for seed in range(count)])


def new_priors(count: int) -> list[ActionDiffusion]:
    made = [generator_for(seed, "prior") for seed in range(count)]
    return [ActionDiffusion(OBSERVATION, ACTION, ActionNetwork(), generator=g) for g in made]


def new_critics(count: int) -> list[IQLCritic]:
    made = [generator_for(seed, "critic") for seed in range(count)]
    return [IQLCritic(OBSERVATION, ACTION, generator=g) for g in made]


def prior_update(data: TransitionDataset, count: int) -> Update:
    settings, draw = PretrainSettings(), draw_actions(data)
    return SeedPretrainer(new_priors(count), draw, settings, generators=generators(count)).update


def critic_update(data: TransitionDataset, count: int) -> Update:
    critics, settings = new_critics(count), CriticSettings()
    return SeedIQL(critics, data, settings, generators=generators(count)).update


def posterior_update(data: TransitionDataset, count: int) -> Update:
    priors, critics, settings = new_priors(count), new_critics(count), PosteriorSettings()
    pairs = zip(priors, critics, strict=True)
    posteriors = [posterior_model(prior, critic, langevin=False) for prior, critic in pairs]
    return SeedFinetuner(
        seed_task(data, priors, posteriors, critics),
        [new_log_z(data, settings, seed) for seed in range(count)],
        settings.finetune,
        rtb(),
        generators=generators(count),
    ).update


STAGES: dict[str, tuple[Callable[[TransitionDataset, int], Update], int]] = {
    "prior": (prior_update, 100),
    "critic": (critic_update, 100),
    "posterior": (posterior_update, 15),
}
"""Stage -> its update for a number of seeds, and how often that is timed."""


def ratios(one: Update, five: Update, repeats: int) -> Iterator[tuple[float, float]]:
    """(clock, processor) of `five` over `one`, run in turn; the first two turns don't count."""
    for turn in range(repeats + 2):
        spent = []
        for update in (one, five):
            clock, cpu = time.perf_counter(), time.process_time()
            update(turn)
            spent.append((time.perf_counter() - clock, time.process_time() - cpu))
        if turn >= 2:
            yield spent[1][0] / spent[0][0], spent[1][1] / spent[0][1]


def main(settings: Settings) -> None:
    """Time every stage and write two rows for each."""
    torch.set_num_threads(settings.threads)
    run = Run(settings.out, {"threads": settings.threads, "fast": settings.fast})
    data, rows = synthetic_data(), []
    for name, (make, repeats) in STAGES.items():
        turns = 3 if settings.fast else repeats
        clock, cpu = zip(*ratios(make(data, 1), make(data, SEEDS), turns), strict=True)
        case = f"{name}, {SEEDS} seeds over one, {settings.threads} threads"
        for unit, values in (("clock", clock), ("cpu", cpu)):
            value = statistics.median(values)
            rows.append({"case": f"{case}, {unit}", "seed": 0, "value": value, "bound": BOUND})
    write_rows(run, rows)


if __name__ == "__main__":
    main(tyro.cli(Settings))
