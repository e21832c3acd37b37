"""A progress bar with rate and time left; plain lines where the output is not a terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES_WITHOUT_TERMINAL = 5


@contextmanager
def progress(
    description: str, total: int, *, start: int = 0
) -> Iterator[Callable[[int, str], None]]:
    """Yields `show(done, note)`, to be called with the number of steps done so far."""
    console = Console()
    begun = time.monotonic()

    def rate(done: int) -> float:
        return (done - start) / max(time.monotonic() - begun, 1e-9)

    if not console.is_terminal:
        every = max(1, (total - start) // LINES_WITHOUT_TERMINAL)

        def line(done: int, note: str) -> None:
            if done == total or (done - start) % every == 0:
                left = (total - done) / max(rate(done), 1e-9)
                text = f"{description}: {done}/{total}, {rate(done):.0f}/s, {left:.0f} s left"
                console.print(f"{text}  {note}", highlight=False, soft_wrap=True)

        yield line
        return
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[rate]:.0f}/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, completed=start, rate=0.0, note="")
        yield lambda done, note: bar.update(task, completed=done, rate=rate(done), note=note)
