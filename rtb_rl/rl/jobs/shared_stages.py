"""Stages that several runs of one data set share: fitted once, then copied into each run."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from rich.console import Console

from rtb_rl.errors import InputError
from rtb_rl.rl.data.dataset import TransitionDataset

T = TypeVar("T")


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
        text = json.dumps(_given(facts), sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        group = self.root / f"{self.dataset.name}-{self.dataset.sha256[:8]}"
        shared = group / f"{own.name}-seed{facts['seed']}-{digest}"
        try:
            group.mkdir(parents=True, exist_ok=True)
            with _lock(group / f"{shared.name}.lock"):
                fit(shared)
        except OSError as error:
            raise InputError(
                f"can't write shared stages in {self.root}: {error.strerror or error}; give another"
                " --stages or make room there"
            ) from error
        part = own.with_name(f"{own.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(shared, part, ignore=shutil.ignore_patterns("checkpoints", "events.*"))
        part.rename(own)
        return fit(own)


def _given(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None, in nested tables as well: as a run's configuration is compared, so that
    an option that came later makes no other stage where it is left out.
    """
    return {
        key: _given(value) if isinstance(value, Mapping) else value
        for key, value in facts.items()
        if value is not None
    }


def _lock(path: Path) -> FileLock:
    """The lock, held; says so where another process has to be waited for."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        Console().print(f"waiting for the run that fits {path.stem}", highlight=False)
        lock.acquire()
    return lock
