"""What a grid shows while it runs: a bar over all cells, the time left, a line a running cell."""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rtb_rl.sweep.attempt import LOG, Outcome, last_line
from rtb_rl.sweep.cells import Cell
from rtb_rl.sweep.durations import duration

WIDTH = 60


class Board:
    """Progress of a grid; plain lines where the output is not a terminal.

    `cells` are those to run, `done` says how many of `total` were finished before, `rows` teach how
    long a cell of each agent takes.
    """

    def __init__(
        self,
        root: Path,
        cells: Sequence[Cell],
        *,
        total: int,
        done: int,
        workers: int,
        rows: Iterable[Mapping[str, Any]] = (),
    ):
        self.root, self.workers, self.total, self.done, self.failed = root, workers, total, done, 0
        self.left = dict.fromkeys(cells)
        self.running: dict[Cell, float] = {}
        self.seconds: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            if row.get("wall_seconds"):
                self.seconds[row["agent"]].append(row["wall_seconds"])
        self.console = Console()
        self._live = Live(self, console=self.console, refresh_per_second=2, transient=True)

    def __enter__(self) -> "Board":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def started(self, cell: Cell) -> None:
        """A cell began to run."""
        self.running[cell] = time.monotonic()

    def ended(self, cell: Cell, outcome: Outcome) -> None:
        """A cell ended."""
        self.running.pop(cell, None)
        self.left.pop(cell, None)
        if outcome.error is None:
            self.done += 1
        else:
            self.failed += 1
        if outcome.seconds is not None:
            self.seconds[cell.agent].append(outcome.seconds)
        how = f"failed: {outcome.error}" if outcome.error else "done"
        took = "" if outcome.seconds is None else f", {duration(outcome.seconds)}"
        self.say(f"{self._count()}  {cell.title}: {how}{took}{self._remaining()}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """Until all are run, by the mean of each agent's cells so far; None before any ended."""
        every = [value for values in self.seconds.values() for value in values]
        if not every:
            return None
        now, mean = time.monotonic(), fmean(every)
        of_agent = {agent: fmean(values) for agent, values in self.seconds.items() if values}
        each = [
            max(of_agent.get(cell.agent, mean) - (now - self.running.get(cell, now)), 0.0)
            for cell in self.left
        ]
        return max(sum(each) / self.workers, max(each, default=0.0))

    def __rich__(self) -> Group:
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(self.total, self.done + self.failed, width=30)
        head.add_row("grid", bar, Text(self._count() + self._remaining()))
        lines = Table.grid(padding=(0, 2))
        for cell, begun in list(self.running.items()):
            note = last_line(self.root / cell.path / LOG)[:WIDTH]
            lines.add_row(
                Text(f"  {cell.title}"), duration(time.monotonic() - begun), Text(note, "dim")
            )
        return Group(head, lines)

    def _count(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.done}/{self.total}{failed}"

    def _remaining(self) -> str:
        left = self.seconds_left()
        return f", {duration(left)} left" if left and self.left else ""
