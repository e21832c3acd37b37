"""Finished runs that are joined in a table: what they say, and what names a line of it."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rtb_rl.errors import InputError

Choices = Mapping[str, Any]
"""Path of a choice -> its value: "learning_rate" of a program's options, "finetune.learning_rate"
of the posterior's settings."""


def read_finished(directory: Path, programs: Collection[str]) -> tuple[Any, Any, Any]:
    """Its config.json, results.json and manifest.json.

    InputError for a run that isn't finished, or that is of none of these programs.
    """
    paths = [directory / f"{name}.json" for name in ("config", "results", "manifest")]
    if not paths[1].exists():
        raise InputError(f"{directory} has no {paths[1].name}; finish that run first")
    config, results, manifest = (json.loads(path.read_text()) for path in paths)
    if config.get("program") not in programs:
        raise InputError(
            f"{directory} is no run of {' or '.join(programs)}, whose rows are joined here; leave"
            " it out"
        )
    return config, results, manifest


def choices_of(config: Mapping[str, Any], leave_out: Collection[str]) -> Choices:
    """The options of a run's config.json and the settings of its posterior, but some paths.

    An option of which the posterior has a setting is what that says.
    """
    found = {**config, **dict(_flat(config["settings"].get("posterior", {})))}
    return {path: value for path, value in found.items() if path not in leave_out}


def line_name(method: str, choices: Choices, others: Sequence[Choices]) -> str:
    """The method, with those of its choices beside it that are not those of all others."""
    parts = [method]
    paths = {path for other in others for path in other}
    for path, value in choices.items():
        said = value is not None and value is not False
        if said and any(other.get(path) != value for other in others):
            name = _shortest(path, paths)
            parts.append(name if value is True else f"{name} {value}")
    return ", ".join(parts)


def _shortest(path: str, paths: Collection[str]) -> str:
    """The end of a path that no other one has."""
    steps = path.split(".")
    for count in range(1, len(steps)):
        name = ".".join(steps[-count:])
        if not any(other != path and f".{other}".endswith(f".{name}") for other in paths):
            return name
    return path


def _flat(settings: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    """All settings by their paths, joined by dots."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{inside}{name}.")
        else:
            yield inside + name, value
