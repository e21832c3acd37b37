"""Stages that several runs of one data set share: fitted once, then copied into each run."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rtb_rl.errors import InputError
from rtb_rl.rl.data.dataset import TransitionDataset
from rtb_rl.rl.data.file_lock import held_lock

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
