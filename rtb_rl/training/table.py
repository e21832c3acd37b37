"""Tables of methods: the same numbers as Markdown and on the console, and means over seeds."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Columns = Mapping[str, tuple[str, str | None]]
"""Title -> (key of a row, key of its standard error)."""

Rows = Mapping[str, Mapping[str, Any]]
"""Name of a method -> its row."""


def slug(name: str) -> str:
    """A name as that of a file."""
    return re.sub(r"\W+", "_", name)


def mean_over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of every number over rows that differ by their seed alone, with its standard error.

    NAME_error becomes the standard deviation of NAME over the seeds by the root of their number,
    which says more than the errors of the draws, and stands where draws can give none; but errors
    of what begins with "reference_" are averaged, since all seeds have one reference. Rows without
    a number (None) don't count; without two that do there is no error. What is no number in the
    first row becomes None. A single row is returned as it is.
    """
    if len(rows) == 1:
        return dict(rows[0])
    found: dict[str, Any] = dict.fromkeys(rows[0])
    for name in rows[0]:
        mean_of = name.removesuffix("_error")
        of_seeds = mean_of != name and mean_of in rows[0] and not name.startswith("reference_")
        taken = mean_of if of_seeds else name
        if not isinstance(rows[0][taken], int | float):
            continue
        values = [row[taken] for row in rows if row[taken] is not None]
        if not of_seeds:
            same = all(value == values[0] for value in values)  # a count stays a whole number
            found[name] = values[0] if same else statistics.fmean(values)
        elif len(values) > 1:
            found[name] = statistics.stdev(values) / len(values) ** 0.5
    return found


def cells(columns: Columns, row: Mapping[str, Any]) -> list[str]:
    """One row, in the order of the columns; a dash where a method has no such number."""
    return [_cell(row.get(key), row.get(error or "")) for key, error in columns.values()]


def markdown(columns: Columns, rows: Rows) -> str:
    """The table as Markdown."""
    lines = ["| method | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    lines += [f"| {name} | {' | '.join(cells(columns, row))} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def print_table(title: str, columns: Columns, rows: Rows, *, width: int = 150) -> None:
    """The same on the console."""
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for column in columns:
        table.add_column(escape(column), justify="right")
    for name, row in rows.items():
        table.add_row(name, *cells(columns, row))
    Console(width=width).print(table)


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    digits = 0 if isinstance(value, int) or abs(value) >= 100 else 3
    spread = "" if error is None else f" ± {error:.{digits}f}"
    return f"{value:.{digits}f}{spread}"
