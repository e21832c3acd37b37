"""Milliseconds of the parts that users wait for, on HalfCheetah shapes, with bounds.

    rtb-rl bench speed --out runs/speed

Medians of repeats, with the number of threads torch chooses. The bounds come from other
implementations on a two-core machine with 170 GFLOP/s: a twentieth of the published code's
iteration (13.6 s for 4,096 on-policy and 4,096 off-policy trajectories of 75 levels), 3 ms for one
action and 5 ms for ten (published code: 128 and 177), 200 critic and 250 prior steps a second at
batch 256. The matrix product says how fast the machine was.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

from rtb_rl.core import ConditionalLogZ
from rtb_rl.nn import MLP
from rtb_rl.rl import (
    IQL,
    ActionDiffusion,
    ActionNetwork,
    IQLCritic,
    Transitions,
    offline_rl_task,
    posterior_model,
)
from rtb_rl.training import (
    Finetuner,
    FinetuneSettings,
    Mix,
    Pretrainer,
    PretrainSettings,
    Run,
    generator_for,
    write_rows,
)
from rtb_rl.training.memory import peak_memory

OBSERVATION, ACTION = 17, 6
TRAJECTORIES = 4096


@dataclass(frozen=True)
class Settings:
    """Milliseconds of the parts that users wait for."""

    out: Path = Path("runs/speed")
    fast: bool = False
    """A few repeats only."""


class SyntheticData:
    """Transitions of HalfCheetah's shapes, drawn once."""

    name = "synthetic"

    def __init__(self, rows: int = 100_000):
        generator = generator_for(0, "data")
        self.observations = torch.randn((rows, OBSERVATION), generator=generator)
        self.actions = torch.rand((rows, ACTION), generator=generator) * 2 - 1
        self.rewards = torch.randn(rows, generator=generator)

    def sample(self, n: int, *, generator: torch.Generator) -> Transitions:
        row = torch.randint(len(self.rewards), (n,), generator=generator)
        s, a, r = (t.index_select(0, row) for t in (self.observations, self.actions, self.rewards))
        return Transitions(s, a, r, s, torch.zeros(n, dtype=torch.bool))


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call, after two that don't count."""
    times = []
    for index in range(repeats + 2):
        begun = time.perf_counter()
        function()
        if index >= 2:
            times.append(time.perf_counter() - begun)
    return 1000 * statistics.median(times)


def new_prior(levels: int = ActionNetwork().levels) -> ActionDiffusion:
    network = ActionNetwork(levels=levels)
    return ActionDiffusion(OBSERVATION, ACTION, network, generator=generator_for(0, "prior"))


def finetuner_of(levels: int, mix: Mix, conditions: int) -> Finetuner:
    """A fine-tuning of an untrained prior towards an untrained critic."""
    prior, data = new_prior(levels), SyntheticData()
    critic = IQLCritic(OBSERVATION, ACTION, generator=generator_for(0, "critic"))
    posterior = posterior_model(prior, critic, langevin=False)
    task = offline_rl_task(data, prior.diffusion, prior.denoiser, posterior.denoiser, critic)  # type: ignore[arg-type]
    log_z = ConditionalLogZ(MLP(OBSERVATION, 1, generator=generator_for(0, "log_z")))
    settings = FinetuneSettings(conditions=conditions, mix=mix)
    return Finetuner(task, log_z, settings, generator=generator_for(0, "finetune"))


def update_rows(repeats: int) -> Iterator[tuple[str, float, float | None]]:
    half = TRAJECTORIES // 4
    for name, mix, conditions, bound in (
        ("update, 4096 trajectories (3/4 on-policy), ms", Mix(on_policy=3, data=1), half, 680.0),
        (
            "update, 4096 on-policy and 4096 off-policy, ms",
            Mix(on_policy=1, data=1),
            TRAJECTORIES,
            None,
        ),
    ):
        finetuner = finetuner_of(ActionNetwork().levels, mix, conditions)
        yield name, milliseconds(lambda f=finetuner: f.update(1), max(3, repeats // 10)), bound


def act_rows(repeats: int) -> Iterator[tuple[str, float, float | None]]:
    prior = new_prior()
    posterior = posterior_model(prior, None, langevin=False).requires_grad_(False)
    generator = generator_for(0, "act")
    for count, bound in ((1, 3.0), (10, 5.0), (256, None)):
        observations = torch.randn((count, OBSERVATION), generator=generator)
        value = milliseconds(
            lambda o=observations: posterior.sampler.sample(o, 1, generator=generator), repeats
        )
        yield f"action for {count} observation(s), ms", value, bound


def training_rows(repeats: int) -> Iterator[tuple[str, float, float | None]]:
    data, generator = SyntheticData(), generator_for(0, "training")
    iql = IQL(IQLCritic(OBSERVATION, ACTION, generator=generator))
    value = milliseconds(lambda: iql.update(data.sample(256, generator=generator)), repeats)
    yield "IQL step (Q and V), batch 256, ms", value, 5.0
    prior = new_prior()

    def draw(n: int, *, generator: torch.Generator):
        batch = data.sample(n, generator=generator)
        return batch.actions, batch.observations

    trainer = Pretrainer(
        prior.diffusion, prior.denoiser, draw, PretrainSettings(), generator=generator
    )
    yield "prior step, batch 256, ms", milliseconds(lambda: trainer.update(0), repeats), 4.0


def memory_rows() -> Iterator[tuple[str, float, float | None]]:
    """Peak memory of an update in a process of its own, at few and at many levels."""
    peaks = {}
    for levels in (10, 80):
        peaks[levels] = peak_memory(partial(three_updates, levels))
        yield f"peak memory of a process with updates of {levels} levels, MiB", peaks[levels], None
    yield "peak memory at 80 levels over that at 10", peaks[80] / peaks[10], 1.1


def three_updates(levels: int) -> None:
    finetuner = finetuner_of(levels, Mix(on_policy=3, data=1), TRAJECTORIES // 4)
    for step in range(3):
        finetuner.update(step)


def matrix_row(repeats: int) -> Iterator[tuple[str, float, float | None]]:
    matrix = torch.randn((2048, 2048), generator=generator_for(0, "matrix"))
    seconds = milliseconds(lambda: matrix @ matrix, max(5, repeats // 10)) / 1000
    yield "machine: float32 matrix product of 2048, GFLOP/s", 2 * 2048**3 / seconds / 1e9, None


def main(settings: Settings) -> None:
    """Measure everything in turn and write one row a figure."""
    repeats = 20 if settings.fast else 200
    run = Run(settings.out, {"fast": settings.fast})
    rows = [
        {"case": case, "seed": 0, "value": value, "bound": bound}
        for measure in (matrix_row, act_rows, training_rows, update_rows)
        for case, value, bound in measure(repeats)
    ]
    rows += [{"case": c, "seed": 0, "value": v, "bound": b} for c, v, b in memory_rows()]
    write_rows(run, rows)


if __name__ == "__main__":
    main(tyro.cli(Settings))
