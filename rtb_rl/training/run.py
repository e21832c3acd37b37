"""A run: the directory that holds all there is to know about one job or one stage of it."""

import hashlib
import importlib.metadata
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import rtb_rl
from rtb_rl.errors import CheckpointError, InputError
from rtb_rl.training.checkpoint import Stateful, load_checkpoint, replace_file, save_checkpoint

PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "minari", "h5py", "safetensors", "accelerate")


class _NotGiven:
    def __repr__(self) -> str:
        return "not given"


_NOT_GIVEN = _NotGiven()


class Run:
    """config.json, manifest.json, metrics.jsonl, TensorBoard events, checkpoints/, results.json.

    Opening a directory that exists continues it; its configuration must be the same. Raises
    InputError for another configuration or a directory that can't be written.
    """

    def __init__(self, directory: str | Path, config: Mapping[str, Any]):
        self.directory = Path(directory)
        self.config = json.loads(json.dumps(config, default=str))
        self._writer = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._check_config()
            replace_file(self.directory / "config.json", _pretty(self.config))
            if not (self.directory / "manifest.json").exists():
                replace_file(self.directory / "manifest.json", _pretty(manifest(self.config)))
        except OSError as error:
            raise InputError(
                f"can't write the run directory {self.directory}: {error.strerror or error};"
                " give another --out or make room there"
            ) from error

    def _check_config(self) -> None:
        path = self.directory / "config.json"
        if not path.exists():
            if (self.directory / "results.json").exists() or (self.directory / "prior").exists():
                raise InputError(
                    f"{self.directory} holds results but no config.json; give another --out"
                )
            return
        try:
            old = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(
                f"{path} is not readable JSON ({error}); give another --out"
            ) from error
        if changed := _changes(old, self.config):
            raise InputError(
                f"{self.directory} is a run of another configuration: {'; '.join(changed)}. Give"
                " another --out, or remove that directory to start again"
            )

    def stage(self, name: str, config: Mapping[str, Any]) -> "Run":
        """A stage in a sub-directory, with a configuration of its own."""
        return Run(self.directory / name, config)

    @property
    def id(self) -> str:
        """Short digest of the manifest: which versions, seed and moment made this run."""
        return hashlib.sha256((self.directory / "manifest.json").read_bytes()).hexdigest()[:12]

    @property
    def results(self) -> dict[str, Any] | None:
        """results.json, or None while the run is not complete."""
        path = self.directory / "results.json"
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write results.json: from now on the run is complete."""
        replace_file(self.directory / "results.json", _pretty(results))
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and the same scalars to TensorBoard."""
        with open(self.directory / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._tensorboard(step).add_scalar(name, value, step)

    def log_figure(self, step: int, name: str, figure: Any) -> None:
        """A matplotlib figure to TensorBoard."""
        self._tensorboard(step).add_figure(name, figure, step)

    def log_images(self, step: int, name: str, images: Tensor) -> None:
        """A grid of images [n, C, H, W] in [0, 1] to TensorBoard."""
        self._tensorboard(step).add_images(name, images.cpu(), step)

    def log_text(self, step: int, name: str, text: str) -> None:
        """Markdown to TensorBoard."""
        self._tensorboard(step).add_text(name, text, step)

    def save(self, step: int, parts: Mapping[str, Stateful]) -> None:
        """Checkpoint the parts as of `step`."""
        save_checkpoint(self.directory / "checkpoints", step, parts)

    def restore(
        self, parts: Mapping[str, Stateful], *, agree: Callable[[int], int] = lambda step: step
    ) -> int:
        """Load the newest whole checkpoint into the parts; the step it was made at, 0 for none.

        `agree` makes one step of those that several processes found: the first. Metrics logged
        after that step are dropped: they will be logged again.
        """
        loaded = self._load()
        step = loaded[0] if loaded else 0
        agreed = agree(step)
        if agreed != step:
            step, loaded = agreed, self._load(at_most=agreed)
            if agreed and (loaded is None or loaded[0] != agreed):
                raise CheckpointError(
                    f"the processes have no checkpoint in common: step {agreed} is missing in"
                    f" {self.directory}; remove the checkpoints of all of them to start again"
                )
        if loaded is not None and step:
            step, states = loaded
            if missing := [name for name in parts if name not in states]:
                raise CheckpointError(
                    f"the checkpoint of step {step} in {self.directory} has no {missing[0]!r}: it"
                    " was made with other settings; give another directory, or remove this one to"
                    " start again"
                )
            for name, part in parts.items():
                part.load_state_dict(states[name])
        self._drop_metrics_after(step)
        return step

    def _load(self, *, at_most: int | None = None) -> tuple[int, dict] | None:
        console = Console(stderr=True)
        return load_checkpoint(
            self.directory / "checkpoints",
            warn=lambda text: console.print(f"warning: {text}", highlight=False),
            at_most=at_most,
        )

    def _drop_metrics_after(self, step: int) -> None:
        path = self.directory / "metrics.jsonl"
        if path.exists():
            kept = [
                line
                for line in path.read_text().splitlines(keepends=True)
                if _step_of(line) <= step
            ]
            replace_file(path, "".join(kept).encode())

    def _tensorboard(self, step: int):
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.directory), purge_step=step)
        return self._writer


def manifest(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was made with: versions, commit, device, threads, seed."""
    versions = {"rtb-rl": rtb_rl.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "commit": _commit(),
        "seed": config.get("seed"),
        "data_sha256": config.get("data_sha256"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str | None:
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # a line cut short by a kill


def _pretty(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, default=str) + "\n").encode()


def changed_settings(directory: Path, config: Mapping[str, Any]) -> list[str]:
    """In what the run of a directory differs from this configuration, in words: none where it would
    go on.
    """
    old = json.loads((directory / "config.json").read_text())
    return _changes(old, json.loads(json.dumps(config, default=str)))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], within: str = "") -> list[str]:
    """Every setting that differs, by its path through nested tables. One that is None is not given:
    an option that came later doesn't make a run another one where it is left out.
    """
    found = []
    for key in sorted(old.keys() | new.keys()):
        path, was, now = f"{within}{key}", old.get(key, _NOT_GIVEN), new.get(key, _NOT_GIVEN)
        tables = [{} if value is _NOT_GIVEN else value for value in (was, now)]
        if any(tables) and all(isinstance(table, dict) for table in tables):
            found += _changes(*tables, within=f"{path}.")
        elif was != now and not all(value in (None, _NOT_GIVEN) for value in (was, now)):
            found.append(f"{path} was {was!r} and is now {now!r}")
    return found
