"""Tables of methods: the same numbers as Markdown and on the console."""

import re
from collections.abc import Mapping
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
