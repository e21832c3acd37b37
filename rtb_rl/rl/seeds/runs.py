"""Stages of several seeds trained at once: their runs, generators and checkpoints.

What is trained at once is stacked: every tensor of its state has a leading axis over the seeds.
Checkpoints and metrics are cut along it and kept in the directory of each seed, as if the seed had
been trained alone. So an interrupted seed can go on alone, with the others, or with some of them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from rtb_rl.errors import InputError
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.loop import train
from rtb_rl.training.run import Run
from rtb_rl.training.stage import complete

SHARED = "step"  # the number of steps an optimiser has made: one for all seeds


Stages = Sequence[tuple[Run, nn.Module]]
"""For each seed the run of its stage, and the module that it fits."""


class Generators:
    """The generators of several seeds, each with a stream of its own.

    Stands where a generator is expected by what draws from each in turn; as a part of a checkpoint
    its state is stacked.
    """

    def __init__(self, each: Sequence[Generator]):
        self.each = list(each)

    def __len__(self) -> int:
        return len(self.each)

    @property
    def device(self) -> torch.device:
        return self.each[0].device

    def cat(self, draw: Callable[[Generator], Tensor], *, dim: int = 0) -> Tensor:
        """What `draw` draws from each generator, one block after another."""
        return torch.cat([draw(generator) for generator in self.each], dim)

    def state_dict(self) -> dict[str, Tensor]:
        return {"state": torch.stack([generator.get_state() for generator in self.each])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for generator, own in zip(self.each, state["state"], strict=True):
            generator.set_state(own.clone())


def check_seeds(seeds: Sequence[int], **others: Sequence[Any]) -> None:
    """InputError unless there are seeds, directories are distinct and there is one of each."""
    if not seeds:
        raise InputError("there is no seed to train; give at least one")
    for name, values in others.items():
        if len(values) != len(seeds):
            raise InputError(
                f"there are {len(values)} {name} for {len(seeds)} seeds; give one for each seed"
            )
    directories = [Path(directory).resolve() for directory in others.get("directories", ())]
    if len(set(directories)) != len(directories):
        raise InputError("two seeds have one directory; give each seed a directory of its own")


def fit_together(stages: Stages, fit: Callable[[list[int]], list[dict[str, Any]]]) -> None:
    """Fit the stages that are not complete at once and load the others; afterwards all are frozen.

    `fit` is given their positions, trains their modules in place and returns the results of each.
    """
    pending = [n for n, (run, _) in enumerate(stages) if run.results is None]
    results = iter(fit(pending) if pending else [])
    for run, module in stages:
        complete(run, module, partial(next, results))


def train_together(
    runs: Sequence[Run],
    update: Callable[[int], Mapping[str, Tensor]],
    parts: Mapping[str, Stateful],
    **loop: Any,
) -> float:
    """`train` with stacked parts and metrics [seeds]; an equal share of the seconds, for each seed.

    Raises CheckpointError where the seeds have no whole checkpoint of one step in common.
    """
    seeds = range(len(runs))

    def named(step: int) -> dict[str, Tensor]:
        metrics = update(step)
        return {f"{n}/{name}": values[n] for n in seeds for name, values in metrics.items()}

    return train(cast(Run, SeedRuns(runs)), named, parts, **loop) / len(runs)


class SeedRuns:
    """The runs of several seeds, where `train` expects one."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = list(runs)

    @property
    def directory(self) -> Path:
        return self.runs[0].directory

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """To each run the metrics that begin with its position."""
        for n, run in enumerate(self.runs):
            begin = f"{n}/"
            own = {k.removeprefix(begin): v for k, v in metrics.items() if k.startswith(begin)}
            run.log(step, own)

    def save(self, step: int, parts: Mapping[str, Stateful]) -> None:
        """A checkpoint of each run."""
        states = {name: part.state_dict() for name, part in parts.items()}
        for n, run in enumerate(self.runs):
            run.save(step, {name: _Held(of_seed(state, n)) for name, state in states.items()})

    def restore(self, parts: Mapping[str, Stateful], **_: Any) -> int:
        """Load the newest step that every run has reached; the step, 0 where one has none."""
        common = min(run.restore({}) for run in self.runs)
        held = [{name: _Held() for name in parts} for _ in self.runs]
        for run, own in zip(self.runs, held, strict=True):
            run.restore(own, agree=lambda _: common)
        if common:
            for name, part in parts.items():
                part.load_state_dict(stacked_state([own[name].state for own in held]))
        return common


class _Held:
    """A state on its way between checkpoints of seeds and what is trained."""

    def __init__(self, state: Any = None):
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def of_seed(state: Any, n: int) -> Any:
    """The state of one seed: entry n of every stacked tensor; all else is the same for all."""
    if isinstance(state, Tensor):
        return state[n] if state.ndim else state
    if isinstance(state, Mapping):
        return {key: of_seed(value, n) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [of_seed(value, n) for value in state]
    return state


def stacked_state(states: Sequence[Any]) -> Any:
    """The inverse of `of_seed`: the states of all seeds as one."""
    first = states[0]
    if isinstance(first, Tensor):
        return torch.stack(list(states))
    if isinstance(first, Mapping):
        return {
            key: value if key == SHARED else stacked_state([state[key] for state in states])
            for key, value in first.items()
        }
    if isinstance(first, list | tuple):
        return [stacked_state(values) for values in zip(*states, strict=True)]
    return first
