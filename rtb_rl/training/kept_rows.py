"""Rows of methods that a job measures one by one, kept so that none is measured twice."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from safetensors.torch import load, save
from torch import Generator, Tensor

from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.table import slug

D = TypeVar("D")


class Weighted(Protocol):
    """Draws with importance weights: estimates of log Z, its error and the effective sample size,
    each a tensor of one number.
    """

    @property
    def log_z(self) -> Tensor: ...
    @property
    def standard_error(self) -> Tensor: ...
    @property
    def ess(self) -> Tensor: ...


class KeptRows:
    """rows/NAME.json with the numbers of a method, rows/NAME.safetensors with some of its draws."""

    def __init__(self, run: Run):
        self.run, self.directory = run, run.directory / "rows"

    def measure(
        self,
        name: str,
        draw: Callable[[Generator], D],
        row: Callable[[D, float], Mapping[str, Any]],
        shown: Callable[[D], Mapping[str, Tensor]],
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        """Draw, and keep `row` of the draws and the seconds they took, and the tensors `shown`;
        unless that was done before.
        """
        path = self.directory / f"{slug(name)}.json"
        if path.exists():
            return
        generator = generator_for(seed, name, device=device)
        begun = time.monotonic()
        draws = draw(generator)
        found = {"method": name, **row(draws, time.monotonic() - begun)}
        tensors = {key: value.cpu().contiguous() for key, value in shown(draws).items()}
        self.directory.mkdir(exist_ok=True)
        replace_file(path.with_suffix(".safetensors"), save(tensors))
        replace_file(path, json.dumps(found, indent=2).encode())

    def read(self, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """The rows of these methods, and their tensors; by name."""
        paths = {name: self.directory / f"{slug(name)}.json" for name in names}
        rows = {name: json.loads(path.read_text()) for name, path in paths.items()}
        kept = {
            name: load(path.with_suffix(".safetensors").read_bytes())
            for name, path in paths.items()
        }
        return rows, kept

    def finish(self, results: Mapping[str, Any]) -> None:
        """Finish the run, and say where its results are."""
        self.run.finish(dict(results))
        directory = self.run.directory
        Console().print(
            f"results: {directory / 'results.json'}, figure: {directory / 'figure.png'}\ncurves:"
            f" tensorboard --logdir {directory}",
            highlight=False,
            soft_wrap=True,
        )


def of_reference(draws: Sequence[Weighted]) -> dict[str, float]:
    """What a row says of weighted draws of the prior, one for each condition."""
    errors = torch.stack([one.standard_error for one in draws])
    return {
        "reference_log_z": float(torch.stack([one.log_z for one in draws]).mean()),
        "reference_log_z_error": float(errors.square().sum().sqrt() / len(errors)),
        "reference_ess": float(torch.stack([one.ess for one in draws]).mean()),
    }


def of_training(results: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a row says of a posterior's run, by its results; None: nothing was trained."""
    if results is None:
        return {"log_z": None, "ess": None, "training_calls": 0, "training_seconds": 0.0}
    diagnostics = results["diagnostics"]
    return {
        "log_z": diagnostics["log_z"],
        "log_z_error": diagnostics["log_z_standard_error"],
        "elbo": diagnostics["elbo"],
        "ess": diagnostics["ess"],
        "kl": diagnostics["kl"],
        "training_calls": results["network_calls"],
        "training_seconds": results["seconds"],
    }
