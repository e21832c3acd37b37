"""Grids of programs that take no time, on data of a few episodes of Pendulum."""

import json
from pathlib import Path

import h5py
import numpy as np

TESTS = Path(__file__).parent
COUNTING = "fake_programs.counting"


def write_episodes(path: Path, *, episodes: int = 3, steps: int = 50, seed: int = 0, **attributes):
    """An HDF5 file of cut episodes with random numbers under D4RL's keys; its path as text."""
    random, rows = np.random.default_rng(seed), episodes * steps
    ends = np.arange(1, rows + 1) % steps == 0
    with h5py.File(path, "w") as file:
        file.attrs.update({"env": "Pendulum-v1", **attributes})
        file["observations"] = random.standard_normal((rows, 3)).astype(np.float32)
        file["actions"] = random.uniform(-1, 1, (rows, 1)).astype(np.float32)
        file["rewards"] = random.uniform(-1, 0, rows).astype(np.float32)
        file["terminals"] = np.zeros(rows, bool)
        file["timeouts"] = ends
        file["infos/final_observations"] = random.standard_normal((episodes, 3)).astype(np.float32)
    return str(path)


def write_grid(path: Path, *, agents=(COUNTING,), seeds=(0,), settings=None, tasks, **tables):
    """A grid file; values are TOML where they are JSON, which suffices here."""
    lines = [f"agents = {json.dumps(list(agents))}", f"seeds = {json.dumps(list(seeds))}"]
    every = {"settings": settings or {}}
    every |= {f'tasks."{name}"': table for name, table in tasks.items()}
    of_agents = tables.get("agents_settings", {})
    every |= {f'agents_settings."{name}"': table for name, table in of_agents.items()}
    for name, table in every.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def failures_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
