"""The files that a grid leaves: rows.jsonl, one line a finished cell, and failures.jsonl.

Only the runner writes them, under the lock of the grid. A row is made from what its cell wrote, so
that a row which was lost is made again.
"""

import json
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rtb_rl.errors import InputError
from rtb_rl.sweep.attempt import LOG, Outcome
from rtb_rl.sweep.cells import Cell, Key
from rtb_rl.sweep.data import origin_of
from rtb_rl.training.checkpoint import replace_file


class Rows:
    """rows.jsonl: the cells that have a line, and the next line.

    A last line that a kill cut short is taken off when the file is opened, one that lacks its end
    alone gets it, and `repaired` says so. InputError for any other broken or repeated line.
    """

    def __init__(self, root: Path):
        self.root, self.path = root, root / "rows.jsonl"
        self.repaired: str | None = None
        self.rows: dict[Key, dict[str, Any]] = {}
        content = self.path.read_bytes() if self.path.exists() else b""
        *whole, rest = content.rstrip(b"\n").split(b"\n")
        if _parsed(rest):
            whole, rest = [*whole, rest], b""
        for number, line in enumerate(whole, 1):
            if (row := _parsed(line)) is None or row_key(row) in self.rows:
                raise InputError(
                    f"{self.path} line {number} is {'no row' if row is None else 'a second row'}: "
                    "it was changed by hand; remove the file and run the grid again, which makes "
                    "it anew from the cells"
                )
            self.rows[row_key(row)] = row
        if (kept := b"".join(line + b"\n" for line in whole)) != content:
            replace_file(self.path, kept)
            self.repaired = f"{self.path.name}: the end of the last line was missing or doubled"
        if rest:
            self.repaired = (
                f"{self.path.name}: the last line was cut short ({len(rest)} bytes) and is removed;"
                " its cell's row is written again"
            )

    def add(self, cell: Cell, *, peak_memory_bytes: int | None = None) -> dict[str, Any]:
        """Write the row of a finished cell, once, and flush it to disk."""
        if cell.key in self.rows:
            return self.rows[cell.key]
        row = row_of(cell, self.root, peak_memory_bytes=peak_memory_bytes)
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _write_all(handle, json.dumps(row).encode() + b"\n")
            os.fsync(handle)
        finally:
            os.close(handle)
        self.rows[cell.key] = row
        return row


class Failures:
    """failures.jsonl: the last failure of every cell that has failed and is not finished."""

    def __init__(self, root: Path):
        self.path = root / "failures.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        records = [record for line in lines if (record := _parsed(line.encode()))]
        self.records = {row_key(record): record for record in records}

    def add(self, cell: Cell, outcome: Outcome) -> None:
        """Record how an attempt failed, in the place of an earlier one at the same cell."""
        self.records[cell.key] = {
            "task": cell.task,
            "agent": cell.agent,
            "seed": cell.seed,
            "error": outcome.error,
            "status": outcome.status,
            "seconds": outcome.seconds,
            "log": str(cell.path / LOG),
            "created": _moment(),
        }
        self._write()

    def remove(self, cell: Cell) -> None:
        """Forget the failure of a cell that is finished."""
        if self.records.pop(cell.key, None) is not None:
            self._write()

    def keep(self, keys: Collection[Key]) -> None:
        """Forget the failures of all other cells."""
        if dropped := [key for key in self.records if key not in keys]:
            for key in dropped:
                del self.records[key]
            self._write()

    def _write(self) -> None:
        text = "".join(json.dumps(record) + "\n" for record in self.records.values())
        replace_file(self.path, text.encode())


def begun_cells(root: Path) -> set[Key]:
    """The cells that have a row, or a directory in which their program has begun."""
    path = root / "rows.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    begun = {row_key(row) for line in lines if (row := _parsed(line))}
    for config in root.glob("cells/*/*/seed*/config.json"):
        task, agent, seed = config.parts[-4:-1]
        begun.add((task, agent, int(seed.removeprefix("seed"))))
    return begun


def row_of(cell: Cell, root: Path, *, peak_memory_bytes: int | None = None) -> dict[str, Any]:
    """The row of a finished cell: of the method that its program is for, where it fits several.

    InputError where its files are not those of a finished run of offline RL.
    """
    directory = root / cell.path
    try:
        results, config = (_json(directory / f"{n}.json") for n in ("results", "config"))
        method, data = config["method"], results["dataset"]
        episodes, manifest = results["methods"][method], results["manifest"]
        return {
            "agent": cell.agent,
            "program": cell.program,
            "method": method,
            "task": cell.task,
            "seed": cell.seed,
            "dataset": data["dataset"],
            "data_sha256": data["data_sha256"],
            "origin": origin_of(cell.dataset),
            "env_id": data["env_id"],
            "reference_returns": data["reference_returns"],
            "returns": episodes["returns"],
            "lengths": episodes["lengths"],
            "budget": config["budget"],
            "beta": _beta(directory, cell.overrides),
            "overrides": dict(cell.overrides),
            "curve": results.get("curve", []),
            "best": results.get("best"),
            "timings": results["timings"],
            "wall_seconds": results.get("wall_seconds"),
            "peak_memory_bytes": results.get("peak_memory_bytes") or peak_memory_bytes,
            "diagnostics": results["diagnostics"],
            "versions": results["versions"],
            "commit": manifest["commit"],
            "created": manifest["created"],
            "run": cell.path.as_posix(),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{directory} holds results.json, but no finished run of offline RL ({error!r}); "
            "remove that directory and run the grid again"
        ) from error


def row_key(row: Mapping[str, Any]) -> Key:
    """The cell that a row or a failure is of."""
    return row["task"], row["agent"], row["seed"]


def _beta(directory: Path, overrides: Mapping[str, Any]) -> float | None:
    """Strength of the critic that the policy acts at; None for programs without one."""
    posterior, acting, amortised, energy = (
        directory / place
        for place in (
            "posterior/config.json",
            "acting/results.json",
            "amortised/config.json",
            "qgpo/config.json",
        )
    )
    if energy.exists():  # before `acting`: with --kl both are there, and the same
        return _json(energy)["energy_guidance"]["beta"]
    if posterior.exists():
        return _json(posterior)["posterior"]["finetune"]["beta"]
    if acting.exists():
        return _json(acting)["beta"]
    if amortised.exists():
        return _json(amortised)["acting_beta"]
    return overrides.get("beta")


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A row, where the line is one."""
    try:
        row = json.loads(line)
        row_key(row)
    except (ValueError, KeyError, TypeError):
        return None
    return row


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]


def _moment() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
