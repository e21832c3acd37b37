"""Finished text-to-image runs side by side: which of their rows are one table, and one line."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image.comparison import PRIOR
from rtb_rl.training.finished import Choices, choices_of, line_name, read_finished

PROGRAMS = ("rtb_text_to_image", "text_to_image_baselines")
TASK = ("prompts", "metadata", "negative", "size", "embedder", "prior_seed")
TASK_OF_BUDGET = ("levels", "guidance", "reference_draws")
"""What the runs of one prior and reward must have in common."""
SAMPLING = "ancestral"
"""Of the same: another sampler draws from another prior. Runs older than this option used none."""
NO_CHOICE = (*TASK, SAMPLING, "prior", "prompt_file", "reward", "seed", "beta", "finetune.beta")
NO_CHOICE += ("budget", "draws", "levels", "guidance", "methods", "against", "program", "settings")
NO_CHOICE += ("spent",)
"""Of a configuration: what says nothing of how a method works, or is asked of all methods alike."""


@dataclass(frozen=True)
class Found:
    """A row of a finished run, where it was found, what was asked for, how the method was set up.

    The row: what the run says of one method, with `run`, `prior`, `prior_sha256`, `reward`, `beta`,
    `seed`, `guidance`, `levels`, `embedder`, `classes`, `budget` and `manifest` of the run.
    """

    directory: Path
    row: Mapping[str, Any]
    task: Mapping[str, Any]
    choices: Choices


Lines = Mapping[str, Sequence[Found]]
"""Name of a line of a table -> its rows, one a seed."""

Groups = Mapping[str, Mapping[float, Lines]]
"""Name of prior and reward -> beta -> the lines of a table."""


def rows_of(directory: Path) -> list[Found]:
    """One row a method of a finished run. InputError for a run that isn't, or of another program.

    Of paths only the last part is kept.
    """
    config, results, manifest = read_finished(directory, PROGRAMS)
    budget, (kind, colon, source) = config["settings"], config["reward"].partition(":")
    task = {name: config.get(name) for name in TASK} | {n: budget[n] for n in TASK_OF_BUDGET}
    task[SAMPLING] = config.get(SAMPLING, False)
    shared = {
        "run": directory.name,
        "prior": Path(config["prior"]).name,
        "prior_sha256": results.get("prior_sha256"),
        "reward": kind + colon + Path(source).name if colon else kind,
        "beta": beta_of(directory),
        "seed": config["seed"],
        "guidance": budget["guidance"],
        "levels": budget["levels"],
        "embedder": task["embedder"] and Path(task["embedder"]).name,
        "classes": results["classes"],
        "budget": budget,
        "manifest": manifest,
    }
    choices = choices_of(config, NO_CHOICE)
    rows = results["methods"].values()
    return [Found(directory, {**shared, **row}, task, choices) for row in rows]


def beta_of(directory: Path) -> float:
    """The beta of the target p r^beta of a finished run, whatever it was counted for: see
    `nominal_beta`. InputError where an old run doesn't say.
    """
    config, results = (
        json.loads((directory / f"{name}.json").read_text()) for name in ("config", "results")
    )
    if "beta" in results:
        return float(results["beta"])
    if config["settings"]["posterior"].get("per_dimension"):
        raise InputError(
            f"{directory} counts beta for each number of a latent and does not say how many there"
            " are; give its command again, which only writes its results anew"
        )
    return float(config["beta"])


def groups_of(found: Sequence[Found]) -> Groups:
    """The rows by prior and reward, beta in its order, and line: a method, with the choices in
    which its runs differ beside its name.

    Of the prior there is one row, since its draws are the same for every seed. InputError for runs
    of one prior and reward that aren't of one task, and for a seed that a line has twice.
    """
    worlds: dict[tuple[str, str, str], list[Found]] = defaultdict(list)
    for one in found:
        worlds[one.row["prior"], one.row["reward"], one.row["prior_sha256"] or ""].append(one)
    titles = [f"{prior}, {reward}" for prior, reward, _ in worlds]
    groups = {}
    for title, (_, _, sha), rows in zip(titles, worlds, worlds.values(), strict=True):
        which = f", prior {sha[:8] or 'unknown'}" if titles.count(title) > 1 else ""
        groups[title + which] = _tables_of(rows)
    return groups


def _tables_of(found: Sequence[Found]) -> dict[float, dict[str, list[Found]]]:
    """Beta -> lines, of runs of one prior and reward."""
    for other in found:
        _check_task(found[0], other)
    tables: dict[float, dict[str, list[Found]]] = {}
    for one in sorted(found, key=lambda one: one.row["beta"]):
        line = tables.setdefault(one.row["beta"], {}).setdefault(_name(one, found), [])
        if one.row["method"] != PRIOR:
            _check_seed(line, one)
            line.append(one)
        elif not line:
            line.append(one)
    return tables


def _name(one: Found, found: Sequence[Found]) -> str:
    """The method, with the choices in which its runs differ; of the prior none is asked."""
    method = one.row["method"]
    alike = [other.choices for other in found if other.row["method"] == method != PRIOR]
    return line_name(method, one.choices, alike)


def _check_task(one: Found, other: Found) -> None:
    for name in one.task:
        if one.task[name] != other.task[name]:
            raise InputError(
                f"{one.directory} and {other.directory} have one prior and reward, but {name}"
                f" {one.task[name]!r} and {other.task[name]!r}; make a table of each, with an --out"
                " of its own"
            )


def _check_seed(line: Sequence[Found], one: Found) -> None:
    for other in line:
        if other.row["seed"] == one.row["seed"]:
            raise InputError(
                f"{other.directory} and {one.directory} both hold {one.row['method']!r} of seed"
                f" {one.row['seed']} at beta {one.row['beta']:g}; name one of them"
            )
