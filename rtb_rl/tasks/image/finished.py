"""Finished image runs side by side: which of their rows are one table, and one line."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from rtb_rl.errors import InputError
from rtb_rl.training.finished import Choices, choices_of, line_name, read_finished

PROGRAMS = ("rtb_image", "image_baselines")
STAGES = ("classifier", "judge", "reference_draws")
"""Of a budget: what the runs of one table must have in common, beside data and prior."""
SHA = "prior_sha256"
NO_CHOICE = ("data", "data_sha256", "target", "seed", "prior_seed", "budget", "prior", "levels")
NO_CHOICE += ("unclipped", "share", "beta", "finetune.beta", "draws", "methods", "against")
NO_CHOICE += ("program", "settings", "spent")
"""Of a configuration: what says nothing of how a method works, or is asked of all methods alike."""


class Found(NamedTuple):
    """A row of a finished run, where it was found, what its table must have in common, how the
    method was set up.
    """

    directory: Path
    row: Mapping[str, Any]
    task: Mapping[str, Any]
    choices: Choices


Lines = Mapping[str, Sequence[Found]]
"""Name of a line of a table -> its rows, one a seed."""

Groups = Mapping[tuple[str, str, float], Lines]
"""(Data set, target, beta) -> the lines of a table."""


def rows_of(directory: Path) -> list[Found]:
    """One row a method of a finished run. InputError for a run that isn't, or of another program.

    Of paths only the last part is kept in the rows.
    """
    config, results, manifest = read_finished(directory, PROGRAMS)
    settings, prior = config["settings"], config.get("prior")
    shared = {
        "run": directory.name,
        "data": Path(config["data"]).name,
        "data_sha256": config["data_sha256"],
        "target": results["target"],
        "beta": float(config["beta"]),
        "prior": prior and Path(prior).name,
        SHA: results.get(SHA),
        "prior_seed": config.get("prior_seed"),
        "levels": settings.get("prior", {}).get("levels"),
        "seed": config["seed"],
        "budget": settings,
        "manifest": manifest,
    }
    task = {name: shared[name] for name in ("data_sha256", "prior_seed", "levels", SHA)}
    task |= {name: settings.get(name) for name in STAGES}
    task |= {"prior": prior, "prior settings": settings.get("prior")}
    task |= {"unclipped": config.get("unclipped", False)}
    choices, rows = choices_of(config, NO_CHOICE), results["methods"].values()
    return [Found(directory, {**shared, **row}, task, choices) for row in rows]


def groups_of(found: Sequence[Found]) -> Groups:
    """The rows by data set, target and beta, and line: a method, with the choices in which its runs
    differ beside its name.

    InputError for runs of one table that have different priors, classifiers or levels, and for a
    seed that a line has twice.
    """
    tables: dict[tuple[str, str, float], list[Found]] = defaultdict(list)
    for one in found:
        tables[one.row["data"], one.row["target"], one.row["beta"]].append(one)
    return {key: _lines_of(rows) for key, rows in tables.items()}


def _lines_of(found: Sequence[Found]) -> dict[str, list[Found]]:
    for one, other in combinations(found, 2):
        _check_alike(one, other)
    lines: dict[str, list[Found]] = {}
    for one in found:
        method = one.row["method"]
        alike = [other.choices for other in found if other.row["method"] == method]
        line = lines.setdefault(line_name(method, one.choices, alike), [])
        for other in line:
            _check_seed(other, one)
        line.append(one)
    return lines


def _check_alike(one: Found, other: Found) -> None:
    """InputError for rows of one table that have no prior or no reward in common.

    Priors are told apart by their fingerprints; by what is known of them, where a run kept none.
    """
    told = one.task[SHA] and other.task[SHA]
    unasked = ("prior", "prior settings") if told else (SHA,)
    for name, value in one.task.items():
        if name not in unasked and value != other.task[name]:
            raise InputError(
                f"{one.directory} and {other.directory} have one data set, target and beta, but"
                f" {name} {value!r} and {other.task[name]!r}; make a table of each, with its own"
                " --out"
            )


def _check_seed(one: Found, other: Found) -> None:
    """InputError for a seed that is there twice."""
    if one.row["seed"] == other.row["seed"]:
        raise InputError(
            f"{one.directory} and {other.directory} both hold {one.row['method']!r} of seed"
            f" {one.row['seed']}; name one of them"
        )
