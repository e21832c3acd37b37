"""Cells of a grid as processes of this machine."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rtb_rl.sweep.attempt import Attempt, Outcome, begin, end_all
from rtb_rl.sweep.cells import Cell
from rtb_rl.sweep.stopping import stop_requested

POLL = 0.1  # seconds
HELD = 1.0  # seconds until a cell that another process works on is tried again

Started = Callable[[Cell], None]
Ended = Callable[[Cell, Outcome], None]


def run_local(
    cells: Sequence[Cell], root: Path, *, workers: int, started: Started, ended: Ended
) -> None:
    """Run the cells, `workers` at once and in their order, and say how each ended.

    Of two workers one takes another task or seed where it can: cells of one task and seed would
    wait for the stages that they share. A cell that another process works on is taken when that
    has ended. SIGINT and SIGTERM end what runs and raise KeyboardInterrupt.
    """
    waiting = dict.fromkeys(cells, 0.0)  # cell -> when it may be tried
    running: dict[Cell, Attempt] = {}
    with stop_requested() as stopping:
        try:
            while waiting or running:
                if stopping():
                    raise KeyboardInterrupt
                for cell, attempt in list(running.items()):
                    if (outcome := attempt.poll()) is not None:
                        del running[cell]
                        ended(cell, outcome)
                while len(running) < workers and (cell := next_cell(waiting, running)) is not None:
                    attempt = begin(root / cell.path, cell.command(root))
                    if attempt is None:
                        waiting[cell] = time.monotonic() + HELD
                        continue
                    del waiting[cell]
                    if isinstance(attempt, Outcome):
                        ended(cell, attempt)
                        continue
                    running[cell] = attempt
                    started(cell)
                time.sleep(POLL)
        finally:
            end_all(list(running.values()))


def next_cell(waiting: Mapping[Cell, float], running: Iterable[Cell]) -> Cell | None:
    """The first cell that may be tried, of a task and seed that none is running of if there is."""
    now = time.monotonic()
    ready = [cell for cell, moment in waiting.items() if moment <= now]
    busy = {(cell.task, cell.seed) for cell in running}
    apart = (cell for cell in ready if (cell.task, cell.seed) not in busy)
    return next(apart, ready[0] if ready else None)
