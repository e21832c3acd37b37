"""A grid of tasks, agents and seeds: read from a TOML file, checked whole, kept as grid.json.

    agents = ["rtb_iql", "iql"]
    seeds = [0, 1, 2]
    [settings]                     # options of every cell's program
    budget = "demo"
    [tasks.hopper-medium-replay]   # dataset, and options of the programs on this task
    dataset = "hopper-medium-replay.hdf5"
    env_id = "Hopper-v4"
    [tasks.hopper-medium-expert]   # several files are one data set, see data.py
    dataset = ["hopper-medium.hdf5", "hopper-expert.hdf5"]
    [agents_settings.rtb_iql]      # options of one program
    beta = 3.0
    [agents_settings.rtb_strong]   # an agent of another name: the same program with other options
    program = "rtb_iql"
    beta = 10.0

An option of an agent goes before one of a task, and that before one of all.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtb_rl.errors import InputError
from rtb_rl.sweep.cells import Cell, Key
from rtb_rl.sweep.programs import check_words, load_settings, option_words
from rtb_rl.training.checkpoint import replace_file

TABLES = ("settings", "tasks", "agents_settings")
KEYS = ("agents", "seeds", *TABLES)
NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


@dataclass(frozen=True)
class Grid:
    """What a grid file says, checked as far as that needs no data."""

    agents: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]
    agents_settings: Mapping[str, Mapping[str, Any]]

    def sources(self, task: str) -> list[str]:
        """What the data set of a task is made of: files, or one name or id."""
        dataset = self.tasks[task]["dataset"]
        return [dataset] if isinstance(dataset, str) else list(dataset)

    def overrides(self, task: str, agent: str) -> dict[str, Any]:
        """Options of a cell's program, those that the runner gives left out."""
        of_task = {key: value for key, value in self.tasks[task].items() if key != "dataset"}
        of_agent = dict(self.agents_settings.get(agent, {}))
        of_agent.pop("program", None)
        return {**self.settings, **of_task, **of_agent}

    def program(self, agent: str) -> str:
        """The program of an agent: that of its name, where the grid names no other."""
        return self.agents_settings.get(agent, {}).get("program", agent)

    def cells(self, datasets: Mapping[str, str], root: Path) -> list[Cell]:
        """Every cell by seed, then task, then agent, its command line accepted by its program.

        `datasets` says for each task what its programs are given as --dataset.
        """
        kinds = {agent: load_settings(self.program(agent)) for agent in self.agents}
        cells = []
        for seed in self.seeds:
            for task in self.tasks:
                for agent in self.agents:
                    where = f"task {task}, agent {agent}"
                    overrides = self.overrides(task, agent)
                    words = option_words(kinds[agent], overrides, where)
                    program = self.program(agent)
                    cell = Cell(task, agent, seed, datasets[task], program, tuple(words), overrides)
                    if seed == self.seeds[0]:
                        check_words(kinds[agent], cell.options(root), where)
                    cells.append(cell)
        return cells


def chosen(cells: Sequence[Cell], names: Collection[str]) -> list[Cell]:
    """The cells of these tasks, agents and seeds; of all where none of a kind is named.

    InputError for a name of none of them.
    """
    kinds = [{str(word) for word in kind} for kind in zip(*(c.key for c in cells), strict=True)]
    _known(names, sorted(set().union(*kinds)), "the grid has no task, agent or seed")
    asked = [kind & set(names) or kind for kind in kinds]
    return [
        cell
        for cell in cells
        if all(str(w) in kind for w, kind in zip(cell.key, asked, strict=True))
    ]


def read_grid(path: Path) -> Grid:
    """The grid in a TOML file; InputError for whatever in it is missing, unknown or repeated."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the grid {path} can't be read ({error}); give a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"the grid {path} is not TOML: {error}; correct it") from error
    try:
        return _checked(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _checked(content: Mapping[str, Any]) -> Grid:
    _known(content, KEYS, "the grid has no key")
    for name in TABLES:
        if not isinstance(content.get(name, {}), dict):
            raise InputError(f"{name} is {content[name]!r}; it must be a table, [{name}]")
    agents = _list(content, "agents", str, "names of programs")
    seeds = _list(content, "seeds", int, "whole numbers")
    if min(seeds) < 0:
        raise InputError(f"seeds has {min(seeds)}; give whole numbers from 0 on")
    tasks = content.get("tasks", {})
    if not tasks:
        raise InputError("tasks is empty; name data sets as [tasks.NAME] with dataset = ...")
    for name in (*agents, *tasks):
        if not NAME.fullmatch(name):
            raise InputError(
                f"{name!r} can't name a directory; take letters, digits and . _ + - only"
            )
    for name, task in tasks.items():
        _check_task(name, task)
    of_agents = content.get("agents_settings", {})
    _known(of_agents, agents, "agents_settings has a table for no agent of the grid:")
    for name, table in of_agents.items():
        if not isinstance(table, dict):
            raise InputError(f"agents_settings.{name} is {table!r}; it must be a table of options")
    return Grid(
        tuple(agents),
        tuple(seeds),
        _underscored(content.get("settings", {})),
        {name: _underscored(task) for name, task in tasks.items()},
        {name: _underscored(table) for name, table in of_agents.items()},
    )


def _check_task(name: str, task: Any) -> None:
    dataset = task.get("dataset") if isinstance(task, dict) else None
    if not dataset or not (
        isinstance(dataset, str)
        or (isinstance(dataset, list) and all(isinstance(one, str) and one for one in dataset))
    ):
        raise InputError(
            f"task {name} has dataset {dataset!r}; give a D4RL task, a Minari id, a file, or a "
            "list of HDF5 files"
        )


def _known(names: Collection[str], known: Sequence[str], complaint: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, cutoff=0.5) or known
            raise InputError(f"{complaint} {name!r}; did you mean {', '.join(near)}?")


def _list(content: Mapping[str, Any], key: str, kind: type, what: str) -> list[Any]:
    values = content.get(key)
    right = isinstance(values, list) and values and all(type(value) is kind for value in values)
    if not right or not isinstance(values, list):
        raise InputError(f"{key} is {values!r}; give a list of {what}, at least one")
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        raise InputError(f"{key} has {repeated[0]!r} more than once; name each once")
    return values


def _underscored(options: Mapping[str, Any]) -> dict[str, Any]:
    named = {name.replace("-", "_"): value for name, value in options.items()}
    if len(named) < len(options):
        raise InputError(
            f"options {', '.join(sorted(options))} name one twice, with - and with _; keep one"
        )
    return named


def keep_grid(
    root: Path, grid: Grid, digests: Mapping[str, str], *, begun: Collection[Key]
) -> None:
    """Write grid.json, the grid with the SHA-256 of each task's data.

    InputError where it holds another grid, unless this one adds agents, tasks or seeds, or has
    those otherwise, or not at all, of which no cell has `begun`.
    """
    path = root / "grid.json"
    resolved = {
        "seeds": list(grid.seeds),
        "settings": dict(grid.settings),
        "agents": {agent: dict(grid.agents_settings.get(agent, {})) for agent in grid.agents},
        "tasks": {
            task: {**options, "data_sha256": digests[task]} for task, options in grid.tasks.items()
        },
    }
    if path.exists():
        old = json.loads(path.read_text())
        if difference := _difference(_begun(old, begun), resolved):
            raise InputError(
                f"{root} holds another grid: {difference}. Agents, tasks and seeds may be added, "
                "and changed while no cell of theirs has begun; give another --out, or take the "
                "old grid back"
            )
    replace_file(path, (json.dumps(resolved, indent=2) + "\n").encode())


def _begun(old: Mapping[str, Any], begun: Collection[Key]) -> dict[str, Any]:
    """What of an old grid its cells were made with: a bad option of one that never ran is no part
    of it.
    """
    tasks, agents, seeds = ({key[place] for key in begun} for place in range(3))
    return {
        "seeds": [seed for seed in old["seeds"] if seed in seeds],
        "settings": old["settings"] if begun else {},
        "agents": {name: options for name, options in old["agents"].items() if name in agents},
        "tasks": {name: options for name, options in old["tasks"].items() if name in tasks},
    }


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first thing of the old grid that the new one lacks or has otherwise."""
    if lost := [seed for seed in old["seeds"] if seed not in new["seeds"]]:
        return f"it has seed {lost[0]}, which this one lacks"
    pairs = [("settings", old["settings"], new["settings"])] if old["seeds"] else []
    for kind in ("agents", "tasks"):
        for name, options in old[kind].items():
            if name not in new[kind]:
                return f"it has {kind[:-1]} {name}, which this one lacks"
            pairs.append((f"{kind[:-1]} {name}", options, new[kind][name]))
    for where, was, wanted in pairs:
        for key in sorted(was.keys() | wanted.keys()):
            if was.get(key) != wanted.get(key):
                return f"{where} has {key} {was.get(key)!r} there and {wanted.get(key)!r} here"
    return None
