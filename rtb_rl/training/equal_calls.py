"""A budget of network calls for baselines: what another run spent, and what an update costs."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from rtb_rl.errors import InputError
from rtb_rl.training.calls import NetworkCalls
from rtb_rl.training.posterior_stage import Trainer


class Spent(NamedTuple):
    """Network calls of a run: in training, and in all for each draw that it delivered."""

    training: float
    each: float


def spent_by(run: Path, method: str, program: str, asked: Mapping[str, Any]) -> Spent:
    """What the row of `method` in a finished run of `program` says that it cost.

    InputError where there is none, or where the run was asked for something else: `asked`, by names
    of its configuration.
    """
    path = run / "results.json"
    rows = json.loads(path.read_text()).get("methods", {}) if path.exists() else {}
    if method not in rows:
        raise InputError(f"{run} holds no finished run of {program}; finish it first")
    made = json.loads((run / "config.json").read_text())
    if made.get("program") != program:
        raise InputError(
            f"{run} is a run of {made.get('program')}, not of {program}; name one of that with"
            " --against"
        )
    for name, value in asked.items():
        check_same(run, name, made.get(name), value)
    row = rows[method]
    return Spent(row["training_calls"], row["training_calls"] / row["draws"] + row["calls"])


def check_same(run: Path, name: str, theirs: object, ours: object) -> None:
    """InputError for a run that was asked for something else."""
    if theirs != ours:
        raise InputError(
            f"{run} has {name} {theirs}, and {ours} is asked for here; name a run of the same"
            f" {name} with --against"
        )


def updates_within(
    calls: float, new_trainer: Callable[[], Trainer], networks: Iterable[nn.Module]
) -> int:
    """Updates that cost so many calls of the networks, by the price of the first: 1 or more."""
    trainer = new_trainer()
    counted = NetworkCalls(networks)
    trainer.update(0)
    counted.stop()
    return max(1, round(calls / counted.total))
