"""Tables of what the rows of a comparison were made with, what they cost, and what failed."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rtb_rl.errors import InputError
from rtb_rl.sweep.comparison import Comparison, Row
from rtb_rl.sweep.durations import duration
from rtb_rl.sweep.tables import NOTHING, Cell, Table

SHOWN_OF_HASH = 12
PACKAGES = ("mujoco", "gymnasium", "torch", "rtb-rl")

COST_REMARK = (
    "Process: time of the run's own process, lowest to highest over its runs. Stages: mean seconds "
    "of each stage that the run rests on. A stage that several runs share counts in full for each, "
    "but in the process of the run that fitted it alone."
)


def cost_table(comparison: Comparison) -> Table:
    """Wall time, stages and peak memory, a row a task and agent."""
    rows, records = [], []
    for task in comparison.tasks:
        for agent in comparison.agents:
            cell = comparison.of(task, agent)
            if not cell:
                continue
            wall = [row["wall_seconds"] for row in cell if row.get("wall_seconds") is not None]
            memory = [r["peak_memory_bytes"] for r in cell if r.get("peak_memory_bytes")]
            stages = _mean_timings(cell)
            texts = [
                f"{duration(min(wall))} to {duration(max(wall))}" if wall else NOTHING,
                duration(sum(stages.values())) if stages else NOTHING,
                ", ".join(f"{name} {duration(t)}" for name, t in stages.items()) or NOTHING,
                f"{max(memory) / 2**30:.2f} GiB" if memory else NOTHING,
            ]
            rows.append([Cell(task), Cell(agent), *map(Cell, texts)])
            records.append(
                {"task": task, "agent": agent, "mean_wall_seconds": np.mean(wall) if wall else None}
                | {"stage_seconds": sum(stages.values()) if stages else None}
                | {"peak_memory_bytes": max(memory) if memory else None}
            )
    header = ["task", "agent", "process", "all stages", "stages", "peak memory"]
    return Table("costs", "Time and memory", header, rows, [COST_REMARK], records)


def data_table(comparison: Comparison) -> Table:
    """Data set, environment and versions, a row a task."""
    rows = []
    for task in comparison.tasks:
        runs = comparison.of(task)
        first = runs[0]
        reference = first.get("reference_returns")
        texts = [
            task,
            str(first["dataset"]),
            first["origin"],
            str(first["data_sha256"])[:SHOWN_OF_HASH],
            str(first["env_id"]),
            f"{reference[0]:g}, {reference[1]:g}" if reference else NOTHING,
            *(
                _values((r.get("versions") or {}).get(package) for r in runs)
                for package in PACKAGES
            ),
        ]
        rows.append(list(map(Cell, texts)))
    header = ["task", "data set", "origin", "sha256", "environment", "random, expert", *PACKAGES]
    remark = (
        f"sha256: its first {SHOWN_OF_HASH} digits, of the data in memory. Several values in a "
        "cell: runs of that task were made with different versions."
    )
    return Table("data", "Data, environments and versions", header, rows, [remark])


def run_table(comparison: Comparison) -> Table:
    """Seeds, budget, settings and commit, a row a task and agent."""
    rows = []
    for task in comparison.tasks:
        for agent in comparison.agents:
            if not (cell := comparison.of(task, agent)):
                continue
            first = cell[0]
            texts = [
                task,
                agent,
                _text(first.get("method")),
                ", ".join(str(row["seed"]) for row in cell),
                _values(len(row["returns"]) for row in cell),
                _text(first.get("budget")),
                _values(_short(row.get("beta")) for row in cell),
                _text(first.get("overrides") or None),
                _values(str(row["commit"])[:10] for row in cell if row.get("commit")),
                _days(cell),
            ]
            rows.append(list(map(Cell, texts)))
    header = ["task", "agent", "method", "seeds", "episodes", "budget", "beta", "overrides"]
    return Table("runs", "Runs", [*header, "commit", "made"], rows)


def failure_table(paths: Sequence[Path], comparison: Comparison) -> Table | None:
    """Cells that failed and have no row, from the failures.jsonl beside each file of rows; None
    without one.
    """
    finished = {(row["task"], row["agent"], row["seed"]) for row in comparison.rows}
    failed = [
        _failure(line, f"{path} line {number}")
        for path in sorted({path.parent / "failures.jsonl" for path in paths})
        if path.is_file()
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
        if line.strip()
    ]
    failed = [f for f in failed if (f.get("task"), f.get("agent"), f.get("seed")) not in finished]
    if not failed:
        return None
    keys = ("task", "agent", "seed", "error")
    rows = [[Cell(_text(failure.get(key))) for key in keys] for failure in failed]
    return Table("failures", "Cells that failed", keys, rows, ["None of them is in any table."])


def _mean_timings(rows: Sequence[Row]) -> dict[str, float]:
    timings = [row.get("timings") or {} for row in rows]
    names = dict.fromkeys(name for each in timings for name in each)
    return {
        name: float(np.mean([each[name] for each in timings if name in each])) for name in names
    }


def _failure(line: str, place: str) -> Mapping[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise InputError(f"{place} is not a whole row; remove that line") from error


def _values(values: Iterable[Any]) -> str:
    """The different values, joined."""
    return ", ".join(dict.fromkeys(str(v) for v in values if v is not None)) or NOTHING


def _short(beta: float | None) -> str | None:
    return None if beta is None else f"{beta:.4g}"


def _days(rows: Sequence[Row]) -> str:
    days = sorted({str(row["created"])[:10] for row in rows if row.get("created")})
    return NOTHING if not days else days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _text(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
