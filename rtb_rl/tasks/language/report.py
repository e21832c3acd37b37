"""Side by side: a table of methods, and stories with what each method wrote in the gap."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rtb_rl.tasks.language.prompts import Gap

COLUMNS = {
    "E[log r]": ("log_reward", "log_reward_error"),
    "above reference": ("log_reward_gap", "log_reward_gap_error"),
    "log Z": ("log_z", "log_z_error"),
    "abs. log Z gap": ("log_z_gap", "log_z_gap_error"),
    "ELBO": ("elbo", None),
    "ESS": ("ess", None),
    "BLEU-4": ("bleu", "bleu_error"),
    "GLEU-4": ("gleu", "gleu_error"),
    "BERTScore": ("bert_score", None),
    "distinct-2": ("distinct_2", None),
    "repetition": ("repetition", None),
    "perplexity": ("perplexity", None),
    "training calls": ("training_calls", None),
    "calls / text": ("calls", None),
}
"""Title -> (key of a row, key of its standard error)."""


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row of the table, in the order of COLUMNS; a dash where a method has no such number."""
    return [_cell(row.get(key), row.get(error or "")) for key, error in COLUMNS.values()]


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as Markdown."""
    lines = ["| method | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    lines += [f"| {name} | {' | '.join(cells(row))} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def print_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The same on the console."""
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for column in COLUMNS:
        table.add_column(escape(column), justify="right")
    for name, row in rows.items():
        table.add_row(name, *cells(row))
    Console(width=190).print(table)


def stories(human: Sequence[Gap], written: Mapping[str, Sequence[Gap]], *, count: int = 12) -> str:
    """Markdown: each context with the gap, and below it what people and every method wrote."""
    parts = ["# Stories with a gap\n"]
    for i, gap in enumerate(human[:count]):
        parts.append(f"{gap.left} **[...]** {gap.right}\n")
        parts.append(f"- *human*: {gap.middle}")
        parts += [f"- *{name}*: {gaps[i].middle}" for name, gaps in written.items()]
        parts.append("")
    return "\n".join(parts)


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    digits = 0 if isinstance(value, int) or abs(value) >= 100 else 3
    spread = "" if error is None else f" ± {error:.{digits}f}"
    return f"{value:.{digits}f}{spread}"
