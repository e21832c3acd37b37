"""How far trained posteriors are from the exact ones, for continuous and discrete diffusion.

    rtb-rl bench exactness --fast --out runs/exactness    about five minutes on two cores
    rtb-rl bench exactness --out runs/exactness-full      about an hour

Every case runs in a directory of its own and is skipped when it is complete, so that a benchmark
which was killed goes on. Ends with rows.jsonl, table.md, mistakes.md and figures. With `--peer
PYTHON`, an interpreter that has torchgfn, the peer fits the 25 -> 9 toy on the same machine.
"""

import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro
from rich.console import Console

from rtb_rl.errors import InputError
from rtb_rl.exactness import (
    FAST,
    FULL,
    Case,
    Effort,
    Row,
    amortised,
    chains,
    check_mistakes,
    discrete,
    draw_figures,
    markdown,
    mistakes_markdown,
    mixtures,
    rare,
    read_curve,
    row,
)
from rtb_rl.training import Run, write_rows
from rtb_rl.training.progress import progress

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Settings:
    """Exactness of trained posteriors."""

    out: Path = Path("runs/exactness")
    fast: bool = False
    """Fewer levels, updates, problems and seeds; wider bounds."""
    only: tuple[str, ...] = ()
    """Names of cases; not given: all of them."""
    workers: int = 2
    """Processes of one thread each."""
    peer: Path | None = None
    """A Python interpreter with torchgfn; not given: no peer."""
    peer_seconds: int = 300
    """Time for the peer's fine-tuning; its prior gets up to twice as much."""


@dataclass(frozen=True)
class Job:
    """One case with one seed."""

    name: str
    case: Case
    seed: int

    def __call__(self, out: Path, effort: Effort) -> list[Row]:
        torch.set_num_threads(1)
        run = Run(out / f"{self.name}-{self.seed}", {"case": self.name, "seed": self.seed})
        if run.results is None:
            begun = time.monotonic()
            with open(run.directory / "log.txt", "a") as log, redirect_stdout(log):
                rows = self.case(run, effort, self.seed)
            run.finish({"rows": rows, "seconds": time.monotonic() - begun})
        assert run.results is not None
        return run.results["rows"]


def jobs(effort: Effort) -> list[Job]:
    """All cases; random problems last, one of each size after the other."""
    several: list[tuple[str, Case, int]] = [
        ("nine", mixtures.nine, effort.nine_seeds),
        ("levels", chains.levels, 1),
        ("rare_mode", rare.rare_mode_mixes, 1),
        ("calibration", amortised.calibration, 1),
        ("temperature", amortised.temperature, 1),
        ("fixed_order", discrete.fixed_order, 1),
        ("several_reveals", discrete.several_reveals, 1),
        ("random_order", discrete.random_order, 1),
        ("linear_chain", chains.linear_chain, 1),
        ("learned_start", chains.learned_start, 1),
        ("nine_controls", mixtures.nine_controls, effort.controls),
    ]
    listed = [Job(name, case, seed) for name, case, seeds in several for seed in range(seeds)]
    return listed + [
        Job(f"mixture{size}", partial(mixtures.random_mixtures, size=size), seed)
        for seed in range(effort.problems)
        for size in mixtures.SIZES
    ]


def chosen(effort: Effort, only: Sequence[str]) -> list[Job]:
    """The jobs asked for; InputError for a name that is none."""
    every = jobs(effort)
    names = list(dict.fromkeys(job.name for job in every))
    if unknown := [name for name in only if name not in names]:
        raise InputError(f"no case {', '.join(unknown)}; the cases are {', '.join(names)}")
    return [job for job in every if not only or job.name in only]


def run_all(out: Path, effort: Effort, todo: Sequence[Job], workers: int) -> list[Row]:
    """The rows of all jobs, in their order. A case that fails stops the others not, but the end."""
    failed = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(job, out, effort): job for job in todo}
        with progress("cases", len(todo)) as show:
            for done, future in enumerate(as_completed(futures)):
                job = futures[future]
                if error := future.exception():
                    failed.append(f"{job.name}, seed {job.seed}: {error!r}")
                show(done + 1, f"{job.name}, seed {job.seed}")
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(todo)} cases failed: {'; '.join(failed)}")
    return [row for future in futures for row in future.result()]


def run_peer(out: Path, interpreter: Path, seconds: int) -> list[Row]:
    """The 25 -> 9 toy by torchgfn."""
    curve = out / "torchgfn.jsonl"
    if not curve.exists():
        program = [str(interpreter), str(Path(__file__).with_name("torchgfn_peer.py"))]
        times = ["--seconds", str(seconds), "--prior-seconds", str(2 * seconds)]
        noise = ["--sigma", "2.236", "--t-scale", "1"]  # the published noise of the toy
        part = curve.with_suffix(".part")
        subprocess.run([*program, "--out", str(part), "--seed", "0", *times, *noise], check=True)
        part.rename(curve)
    name, last = "torchgfn, 25 -> 9", read_curve(curve)[-1]
    return [
        *curve_rows(name, 0, curve),
        row(f"{name}: TV against the posterior of its own prior", 0, last["tv_own_prior"]),
    ]


def curve_rows(name: str, seed: int, curve: Path) -> list[Row]:
    """Seconds of training to a TV of 0.05, if that was reached, and TV near 300 seconds."""
    points = read_curve(curve)
    near = min(points, key=lambda point: abs(point["seconds"] - 300))
    rows = [row(f"{name}: TV near 300 s of training", seed, near["tv"])]
    if reached := [point["seconds"] for point in points if point["tv"] <= 0.05]:
        rows.append(row(f"{name}: seconds to a TV of 0.05", seed, min(reached)))
    return rows


def main(settings: Settings) -> None:
    """Run the cases, then write rows, tables and figures."""
    effort, out = FAST if settings.fast else FULL, settings.out
    todo = chosen(effort, settings.only)
    run = Run(out, {"fast": settings.fast, "seed": 0})
    rows = run_all(out, effort, todo, settings.workers)
    for seed, curve in enumerate(sorted(out.glob("nine-*/curve.jsonl"))):
        rows += curve_rows("rtb-rl, 25 -> 9", seed, curve)
    if settings.peer is not None:
        rows += run_peer(out, settings.peer, settings.peer_seconds)
    else:
        Console().print("no --peer PYTHON given: torchgfn is left out")
    caught = check_mistakes(ROOT, out / "mistakes.xml")
    if not caught:
        Console().print("no tests beside this program: the published mistakes are left out")
    rows += [
        row(
            f"published mistake {entry['row']}, not caught", 0, 0.0 if entry["caught"] else 1.0, 0.0
        )
        for entry in caught
    ]
    (out / "table.md").write_text(markdown(rows))
    (out / "mistakes.md").write_text(mistakes_markdown(caught))
    draw_figures(out, rows)
    write_rows(run, rows)
    Console().print(f"table: {out / 'table.md'}, figures: {out}/*.png", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Settings))
