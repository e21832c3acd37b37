"""Run a grid of tasks, agents and seeds; one row a finished cell, for the report.

    rtb-rl bench offline_rl --grid GRID.toml --out DIR --workers 2
    rtb-rl bench offline_rl --grid GRID.toml --out DIR --executor ray --address auto

The grid is a TOML file (rtb_rl/sweep/grid.py says what stands in it) and is checked whole before
any cell starts. A cell is a program with one task and one seed, in DIR/cells/TASK/AGENT/seedSEED;
cells share what they have in common through DIR/stages. The same command continues a directory:
finished cells are skipped, unfinished ones go on from their checkpoints, failed ones are run again
with --retry. To run a finished cell again, remove its directory and its row. Leaves rows.jsonl,
failures.jsonl, grid.json and the runs in DIR.

On a Ray cluster every node must see DIR, the data files and the package under the same paths: cells
write into DIR wherever they run.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from rtb_rl.errors import InputError
from rtb_rl.sweep.cluster import run_on_cluster
from rtb_rl.sweep.data import check_data, data_paths
from rtb_rl.sweep.fill import Executor, fill
from rtb_rl.sweep.grid import chosen, keep_grid, read_grid
from rtb_rl.sweep.local import run_local
from rtb_rl.sweep.locks import grid_lock
from rtb_rl.sweep.rows import begun_cells


@dataclass(frozen=True)
class Settings:
    """A grid of tasks, agents and seeds."""

    grid: Path | None = None
    """TOML file of tasks, agents, seeds and their options; needed."""
    out: Path = Path("runs/offline_rl")
    """Directory of rows, failures and runs; the same command continues what it finds there."""
    workers: int = 2
    """Cells at once, each of one thread; on a cluster its processors decide."""
    only: tuple[str, ...] = ()
    """Tasks, agents and seeds whose cells are run; not given: all of the grid."""
    retry: bool = False
    """Run the cells that failed before again."""
    executor: Literal["local", "ray"] = "local"
    """local: processes of this machine; ray: tasks of a Ray cluster (extra `benchmarks`)."""
    fast: bool = False
    """Without effect: the grid says how long its cells take, such as budget = "smoke"."""
    address: str | None = None
    """Of the Ray cluster, such as auto or HOST:PORT; local: a cluster on this machine."""


def main(settings: Settings) -> None:
    """Check the grid, run what of it is not finished; status 1 where a cell has failed."""
    if settings.grid is None:
        raise InputError("no grid given; name a TOML file of tasks, agents and seeds with --grid")
    if settings.workers < 1:
        raise InputError(f"--workers is {settings.workers}; give 1 or more")
    grid, root = read_grid(settings.grid), settings.out.resolve()
    execute = executor(settings)
    with grid_lock(root):
        paths = data_paths(grid, root)
        every = grid.cells(paths, root)
        cells = chosen(every, settings.only)
        keep_grid(root, grid, check_data(grid, paths), begun=begun_cells(root))
        given = {"workers": settings.workers, "retry": settings.retry}
        failed = fill(cells, root, execute, every=every, **given)
    print(f"rows: {settings.out / 'rows.jsonl'}")
    if failed:
        raise SystemExit(
            f"offline_rl: {failed} of {len(cells)} cells failed, see"
            f" {settings.out / 'failures.jsonl'}; --retry runs them again"
        )


def executor(settings: Settings) -> Executor:
    """What runs the cells."""
    if settings.executor == "local":
        if settings.address is not None:
            raise InputError("--address is of a Ray cluster; give --executor ray with it")
        return partial(run_local, workers=settings.workers)
    if settings.address is None:
        raise InputError("--executor ray needs --address, such as auto, HOST:PORT or local")
    return partial(run_on_cluster, address=settings.address, workers=settings.workers)


if __name__ == "__main__":
    main(tyro.cli(Settings))
