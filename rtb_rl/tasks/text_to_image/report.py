"""The table of a text-to-image comparison."""

from collections.abc import Mapping
from typing import Any

from rtb_rl.tasks.image.report import mark
from rtb_rl.training import table
from rtb_rl.training.table import Rows

COLUMNS = {
    "E[log r]": ("log_reward", "log_reward_error"),
    "5 %": ("low", None),
    "median": ("median", None),
    "95 %": ("high", None),
    "diversity": ("diversity", "diversity_error"),
    "TV of classes": ("tv", None),
    "log Z": ("log_z", "log_z_error"),
    "ELBO": ("elbo", None),
    "ESS": ("ess", None),
    "KL": ("kl", None),
    "training calls": ("training_calls", None),
    "calls / draw": ("calls", None),
    "s / draw": ("seconds", None),
}
"""Title -> (key of a row, key of its standard error)."""


def reference_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The reference as a row of its own, from a row that was compared with it."""
    names = ("log_reward", "log_reward_error", "diversity", "log_z", "log_z_error", "ess")
    found = {name: row.get(f"reference_{name}") for name in names}
    return {**found, **({"tv": 0.0} if "tv" in row else {})}


def with_reference(rows: Rows, title: str) -> Rows:
    """The rows with their marks, below the reference that they were compared with."""
    marked = {name + mark(row): row for name, row in rows.items()}
    return {title: reference_row(next(iter(rows.values()))), **marked}


def markdown(rows: Rows) -> str:
    """The table as Markdown, the reference first."""
    return table.markdown(COLUMNS, with_reference(rows, "*reference*"))


def print_table(title: str, rows: Rows) -> None:
    """The same on the console."""
    table.print_table(title, COLUMNS, with_reference(rows, "reference"), width=170)
