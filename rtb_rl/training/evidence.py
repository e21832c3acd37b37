"""Rows of a benchmark: what was measured, against which bound, by which version."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.run import Run


def write_rows(run: Run, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Write rows {case, seed, value, bound} as rows.jsonl, with `holds` (value <= bound; True
    without a bound) and the manifest's id, print them, and finish the run.
    """
    stamped = [
        {**row, "holds": row["bound"] is None or row["value"] <= row["bound"], "manifest": run.id}
        for row in rows
    ]
    lines = "".join(json.dumps(row) + "\n" for row in stamped)
    replace_file(run.directory / "rows.jsonl", lines.encode())
    table = Table("case", "seed", "value", "bound", "holds")
    for row in stamped:
        bound = "-" if row["bound"] is None else f"{row['bound']:.4g}"
        holds = "yes" if row["holds"] else "NO"
        table.add_row(row["case"], str(row["seed"]), f"{row['value']:.4g}", bound, holds)
    Console(width=110).print(table)
    run.finish({"rows": len(stamped), "hold": sum(row["holds"] for row in stamped)})
    return stamped


def write_comparison(directory: Path, rows: Sequence[Mapping[str, Any]], table: str) -> None:
    """Write rows of a comparison as rows.jsonl and their Markdown as table.md, and print that."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    replace_file(directory / "rows.jsonl", lines.encode())
    replace_file(directory / "table.md", table.encode())
    Console().print(table, highlight=False, markup=False, soft_wrap=True)
