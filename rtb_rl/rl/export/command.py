"""The command `rtb-rl export`."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from rtb_rl.rl.export import exporting
from rtb_rl.rl.export.tracing import Format
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.table import print_table

BATCHES = (1, 64)
FEWEST_TURNS, MOST_TURNS, SECONDS = 5, 51, 4.0


@dataclass(frozen=True)
class Export:
    """Write the policy of a finished run as one file that runs without rtb-rl."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """What the program was given as --out."""
    method: str | None = None
    """prior, iql, best_of_n, rtb or another that the run fitted; the program's own where none is
    given."""
    format: Format = "onnx"
    """onnx: for ONNX Runtime and others; torch: a .pt2 program of torch.export."""
    out: Path | None = None
    """The file; RUN/METHOD.onnx or RUN/METHOD.pt2 where none is given."""
    candidates: int | None = None
    """Draws among which the critic chooses; as the method has it where none is given."""


def export(settings: Export) -> None:
    """Write the file, and print how it agrees and how long an action takes."""
    done = exporting.export_policy(
        settings.directory,
        settings.out,
        method=settings.method,
        format=settings.format,
        candidates=settings.candidates,
    )
    facts = done.facts
    kilobytes = done.path.stat().st_size / 1000
    noise = " x ".join(map(str, facts["inputs"]["noise"]))
    Console().print(
        f"{done.path}: {facts['method']} for {facts['env_id']}, {kilobytes:,.0f} kB\n"
        f"inputs: observations batch x {facts['observation_size']}, noise {noise} from N(0, 1)\n"
        f"largest difference to the Python policy: {done.difference:.1e} half-widths of the box",
        highlight=False,
        soft_wrap=True,
    )
    columns = {f"batch {n}, ms": (f"batch_{n}", None) for n in BATCHES}
    print_table("time of an action, one thread, median", columns, latencies(done), width=100)


def latencies(done: exporting.Export) -> dict[str, dict[str, float]]:
    """Milliseconds of `act`, noise included, for each way of running it at each batch size.

    They take turns, so that what else the machine does strikes all alike.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in done.policies}
    generator = generator_for(0, "latency")
    with one_thread():
        for rows in BATCHES:
            given = exporting.random_observations(done.module, rows, generator)
            calls = {
                name: partial(policy.act, given, generator=generator)
                for name, policy in done.policies.items()
            }
            for name, seconds in _medians(calls).items():
                found[name][f"batch_{rows}"] = 1000 * seconds
    return found


def _medians(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds; the first call of each, which may be slower, is left out."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for turn in range(MOST_TURNS + 1):
        if turn > FEWEST_TURNS and time.perf_counter() - begun > SECONDS:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
