"""Rows of finished runs, read from files, checked, and grouped by task and agent."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rtb_rl.errors import InputError
from rtb_rl.rl.episodes.scores import normalised_score

Row = Mapping[str, Any]

NEEDED = ("agent", "task", "seed", "dataset", "data_sha256", "origin", "env_id", "returns")
SAME_IN_TASK = ("data_sha256", "origin", "env_id", "reference_returns")
SAME_IN_CELL = ("method", "budget", "overrides")
SAME_OF_AGENT = ("program", "method")
BETA_BY_RULE = ("ess", "kl")
"""Overrides by which beta follows from prior and critic, and so from the seed."""


def read_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Every row of these JSON-lines files, checked one by one; none may be broken or repeated."""
    rows: list[dict[str, Any]] = []
    places: dict[tuple[str, str, int], str] = {}
    for path in paths:
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            place = f"{path} line {number}"
            row = _parsed(line, place)
            cell = (row["task"], row["agent"], row["seed"])
            if cell in places:
                raise InputError(
                    f"two rows of one cell, task {cell[0]!r}, agent {cell[1]!r}, seed {cell[2]}: "
                    f"{places[cell]} and {place}; remove one of them"
                )
            places[cell] = place
            rows.append(row)
    return rows


@dataclass(frozen=True)
class Comparison:
    """Rows whose tasks are each one data set and whose cells are each one setting.

    A score is D4RL's normalised score where the task has reference returns, the return elsewhere.
    """

    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise InputError("there are no rows to report; name files of finished runs with --rows")
        for agent in self.agents:
            for key in SAME_OF_AGENT:  # rows of scripts of one's own may lack them
                told = [row for row in self.of(agent=agent) if row.get(key) is not None]
                _check_same(told, (key,), f"agent {agent!r}")
        for task in self.tasks:
            _check_same(self.of(task=task), SAME_IN_TASK, f"task {task!r}")
            for agent in self.agents:
                cell = self.of(task=task, agent=agent)
                where = f"task {task!r}, agent {agent!r}"
                _check_same(cell, SAME_IN_CELL, where)
                if not any(_has_rule(row) for row in cell):
                    # rows of qgpo were once written without their beta
                    _check_same(_with_beta(cell), ("beta",), where)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, sorted."""
        return tuple(sorted({row["task"] for row in self.rows}))

    @cached_property
    def agents(self) -> tuple[str, ...]:
        """Names of the agents, sorted."""
        return tuple(sorted({row["agent"] for row in self.rows}))

    @cached_property
    def normalised_tasks(self) -> tuple[str, ...]:
        """Tasks with reference returns: those that aggregates are over."""
        return tuple(task for task in self.tasks if self.of(task=task)[0].get("reference_returns"))

    def of(self, task: str | None = None, agent: str | None = None) -> tuple[Row, ...]:
        """Rows of a task, of an agent, or of both, in order of the seeds."""
        found = [
            row
            for row in self.rows
            if task in (None, row["task"]) and agent in (None, row["agent"])
        ]
        return tuple(sorted(found, key=lambda row: row["seed"]))

    def runs(self, task: str, agent: str) -> np.ndarray:
        """Score of each run of a cell, [seeds]."""
        return np.array([scores(row).mean() for row in self.of(task, agent)])

    @cached_property
    def missing(self) -> dict[str, tuple[str, ...]]:
        """Agent -> the tasks with reference returns that it has no run of; complete ones absent."""
        there = {(row["agent"], row["task"]) for row in self.rows}
        lacking = {
            agent: tuple(t for t in self.normalised_tasks if (agent, t) not in there)
            for agent in self.agents
        }
        return {agent: tasks for agent, tasks in lacking.items() if tasks}

    @cached_property
    def complete(self) -> tuple[str, ...]:
        """Agents with a run of every task with reference returns: those that are aggregated."""
        if not self.normalised_tasks:
            return ()
        return tuple(agent for agent in self.agents if agent not in self.missing)


def scores(row: Row, returns: Iterable[float] | None = None) -> np.ndarray:
    """Score of each episode of a row, or of other `returns` on its task, [episodes]."""
    values = np.asarray(row["returns"] if returns is None else list(returns), dtype=np.float64)
    if not row.get("reference_returns"):
        return values
    return normalised_score(values, tuple(row["reference_returns"]))


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(f"there is no file {path}; name a rows.jsonl with --rows")
    return path.read_text(encoding="utf-8").split("\n")


def _parsed(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{place} is not a whole row ({error.msg}): whoever wrote it was stopped; run the "
            "same grid again, which writes the row anew, or remove that line"
        ) from error
    if not isinstance(row, dict) or (absent := [key for key in NEEDED if key not in row]):
        lacks = ", ".join(absent) if isinstance(row, dict) else "an object with named values"
        raise InputError(f"{place} lacks {lacks}; give rows that `rtb-rl bench offline_rl` wrote")
    if not isinstance(row["seed"], int) or not isinstance(row["returns"], list):
        raise InputError(
            f"{place} has seed {row['seed']!r} and returns that are a"
            f" {type(row['returns']).__name__}; a row needs a whole number and a list; run that"
            " cell again"
        )
    if not row["returns"]:
        raise InputError(f"{place} has 0 returns, a row needs at least one; run that cell again")
    if not all(isinstance(r, int | float) and math.isfinite(r) for r in row["returns"]):
        raise InputError(f"{place} has returns that aren't finite numbers; run that cell again")
    return row


def _with_beta(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("beta") is not None]


def _has_rule(row: Row) -> bool:
    overrides = row.get("overrides") or {}
    return any(overrides.get(rule) is not None for rule in BETA_BY_RULE)


def _check_same(rows: Sequence[Row], keys: Sequence[str], where: str) -> None:
    for key in keys:
        values = {json.dumps(row.get(key), sort_keys=True): row["seed"] for row in rows}
        if len(values) > 1:
            (one, seed), (other, another) = list(values.items())[:2]
            raise InputError(
                f"{where}: runs differ in {key}, {one} (seed {seed}) and {other} (seed {another}); "
                "compare them under different names or leave one out"
            )
