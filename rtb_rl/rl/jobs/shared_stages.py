"""Stages that several runs of one data set share: fitted once, then copied into each run."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from rtb_rl.errors import InputError
from rtb_rl.rl.critics.training import critic_config
from rtb_rl.rl.data.dataset import TransitionDataset
from rtb_rl.rl.data.file_lock import held_lock
from rtb_rl.rl.jobs.budget import Budget
from rtb_rl.rl.posteriors.prior import prior_config
from rtb_rl.training.run import changed_settings

T = TypeVar("T")
SHARED = ("prior", "critic", "iql")


@dataclass(frozen=True)
class SharedStages:
    """A directory of stages; None: every run fits its own.

    A run holds a lock while it fits a stage, others wait for it. The lock of a process that died is
    free, and the next one continues from its checkpoint.
    """

    root: Path | None
    dataset: TransitionDataset

    def stage(self, own: Path, facts: Mapping[str, Any], fit: Callable[[Path], T]) -> T:
        """What `fit` makes in the run's directory `own`, from the shared stage of these facts.

        `fit` fits a stage in a directory, or loads it where it is complete. A stage that the run
        has begun by itself is continued there. InputError for a root that can't be written.
        """
        if self.root is None or own.exists():
            return fit(own)
        text = json.dumps(_given({**facts, **self._read_as}), sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        group = self.root / f"{self.dataset.name}-{self.dataset.sha256[:8]}"
        shared = group / f"{own.name}-seed{facts['seed']}-{digest}"
        try:
            group.mkdir(parents=True, exist_ok=True)
            lock = held_lock(group / f"{shared.name}.lock", f"fits {shared.name}")
        except OSError as error:
            raise InputError(
                f"can't write shared stages in {self.root}: {error.strerror or error}; give another"
                " --stages or make room there"
            ) from error
        with lock:  # the copy as well: who opens a stage writes its config.json anew
            fit(shared)
            copy_stage(shared, own)
        return fit(own)

    @property
    def _read_as(self) -> dict[str, Any]:
        """What one file may be read as: the stages of two environments are two."""
        low, high = self.dataset.action_low.tolist(), self.dataset.action_high.tolist()
        return {"env_id": self.dataset.env_id, "action_box": [low, high]}


def complete_stages(run: Path) -> list[str]:
    """The stages of a run that another may take over."""
    return [name for name in SHARED if (run / name / "results.json").exists()]


def stage_configs(
    dataset: TransitionDataset, budget: Budget, *, seed: int
) -> dict[str, dict[str, Any]]:
    """The configurations of prior and critic that a run of this budget fits."""
    return {
        "prior": prior_config(dataset, budget.prior, seed=seed),
        "critic": critic_config(dataset, budget.critic, seed=seed),
    }


def to_take_over(share: Path | None, own: Path) -> Path | None:
    """The complete stage of the run to share that has the name of a stage not begun here."""
    if share is None or own.exists() or own.name not in complete_stages(share):
        return None
    return share / own.name


def take_over(share: Path | None, own: Path, config: Mapping[str, Any]) -> None:
    """Copy a stage of the run to share, where it has one and there is none here.

    InputError, before, for one of another configuration.
    """
    if (stage := to_take_over(share, own)) is not None:
        check_same(share, own, config)
        copy_stage(stage, own)


def take_over_where_same(share: Path | None, own: Path, config: Mapping[str, Any]) -> None:
    """As `take_over`; one of another configuration is named and left, to be fitted here."""
    if (stage := to_take_over(share, own)) is None:
        return
    if changed := changed_settings(stage, config):
        told = f"{own.name}: fitted here, for that of --share {share} is another ("
        Console().print(f"{told}{'; '.join(changed)})", highlight=False, soft_wrap=True)
    else:
        copy_stage(stage, own)


def check_same(share: Path | None, own: Path, config: Mapping[str, Any]) -> None:
    """InputError where a stage would be taken over that has another configuration."""
    stage = to_take_over(share, own)
    if stage is not None and (changed := changed_settings(stage, config)):
        raise InputError(
            f"--share {share} has another {own.name} ({'; '.join(changed)}); ask for the same,"
            " share a run that has it, or leave --share out"
        )


def copy_stage(stage: Path, own: Path) -> None:
    """Copy a complete stage to where there is none: whole, or, at a kill, under another name."""
    part = own.with_name(f"{own.name}.part")
    left = shutil.ignore_patterns("checkpoints", "events.*", ".*.partial")
    try:
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(stage, part, ignore=left)
        part.rename(own)
    except OSError as error:
        raise InputError(
            f"can't copy the stage {stage} to {own}: {error.strerror or error}; give another --out"
            " or make room there"
        ) from error


def _given(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None, in nested tables as well: as a run's configuration is compared, so that
    an option that came later makes no other stage where it is left out.
    """
    return {
        key: _given(value) if isinstance(value, Mapping) else value
        for key, value in facts.items()
        if value is not None
    }
