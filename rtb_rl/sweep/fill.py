"""Fill a grid's directory: what is finished gets its row, what is not is run."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rtb_rl.errors import InputError
from rtb_rl.sweep.attempt import Outcome
from rtb_rl.sweep.board import Board
from rtb_rl.sweep.cells import Cell
from rtb_rl.sweep.rows import Failures, Rows

Executor = Callable[..., None]
"""`execute(cells, root, started=..., ended=...)` runs cells; run_local or run_on_cluster."""


def fill(
    cells: Sequence[Cell],
    root: Path,
    execute: Executor,
    *,
    every: Sequence[Cell],
    workers: int,
    retry: bool,
) -> int:
    """Run the cells that are not finished; how many have failed, now or before.

    Every finished cell of the grid, whose cells are `every`, has one line of rows.jsonl afterwards,
    every failed one of failures.jsonl; those that are in the grid no more have none of the latter.
    A cell with a line is finished, even where its directory was removed. Cells that failed before
    are run again with `retry` only. The caller holds the lock of `root`.
    """
    rows, failures = Rows(root), Failures(root)
    missing = [c for c in every if c.key not in rows.rows and c.is_finished(root)]
    for cell in missing:
        _keep(rows, failures, cell, Outcome())
    finished = [cell for cell in cells if cell.key in rows.rows]
    failures.keep({cell.key for cell in every if cell.key not in rows.rows})
    left = [cell for cell in cells if cell not in finished]
    failed = [cell for cell in left if cell.key in failures.records and not retry]
    todo = [cell for cell in left if cell not in failed]
    done = len(finished)
    known = rows.rows.values()
    with Board(root, todo, total=len(cells), done=done, workers=workers, rows=known) as board:
        board.failed = len(failed)
        for line in filter(None, [rows.repaired, _before(done, len(missing), len(failed))]):
            board.say(line)
        ended = partial(_ended, board, rows, failures)
        execute(todo, root, started=board.started, ended=ended)
        return board.failed


def _ended(board: Board, rows: Rows, failures: Failures, cell: Cell, outcome: Outcome) -> None:
    board.ended(cell, _keep(rows, failures, cell, outcome))


def _keep(rows: Rows, failures: Failures, cell: Cell, outcome: Outcome) -> Outcome:
    """Write the row or the failure of a cell that ended; results without a row are a failure."""
    if outcome.error is None:
        try:
            rows.add(cell, peak_memory_bytes=outcome.peak_memory_bytes)
            failures.remove(cell)
            return outcome
        except InputError as error:
            outcome = replace(outcome, error=str(error))
    failures.add(cell, outcome)
    return outcome


def _before(done: int, missing: int, failed: int) -> str | None:
    parts = [
        f"{done} cells were finished before" if done else "",
        f"{missing} finished cells had no row, which is written" if missing else "",
        f"{failed} failed before and are left out; --retry runs them again" if failed else "",
    ]
    return ", ".join(filter(None, parts)) or None
