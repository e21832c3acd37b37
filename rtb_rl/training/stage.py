"""A stage of a job: one module fitted in a directory of its own.

It is skipped when complete, resumed when it was interrupted, and refused when the directory was
made with another configuration. `fingerprint` ties it to the stages before it.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load, save
from torch import nn

from rtb_rl.errors import CheckpointError
from rtb_rl.training.checkpoint import Stateful, replace_file
from rtb_rl.training.run import Run

WEIGHTS = "model.safetensors"


def device_for_training() -> torch.device:
    """The device that accelerate chooses: this process's GPU, or the CPU."""
    return Accelerator().device


def complete(
    run: Run, module: nn.Module, fit: Callable[[], dict[str, Any]], *, part: Stateful | None = None
) -> None:
    """Fit the module, or load it where the run has results; afterwards it is frozen.

    `fit` trains it in place and returns the results to keep. `part` is what of it is written and
    read: all, or the TrainedState of a module whose frozen rest is loaded elsewhere.
    """
    part = part or module
    if run.results is None:
        results = fit()
        data = save(tensors_of(part))
        replace_file(run.directory / WEIGHTS, data)
        run.finish({**results, "sha256": hashlib.sha256(data).hexdigest()})
    load_weights(run.directory, part)
    module.requires_grad_(False).eval()


def load_weights(directory: Path, module: Stateful, *, name: str = WEIGHTS) -> None:
    """Load a complete stage's weights into a module of the same shape.

    Raises CheckpointError where the file is missing, damaged (it doesn't match the digest that
    `complete` kept of it) or of another shape.
    """
    path = directory / name
    try:
        data = path.read_bytes()
        known = _kept_digest(directory) if name == WEIGHTS else None
        if known not in (None, hashlib.sha256(data).hexdigest()):
            raise ValueError("it doesn't match its digest in results.json")
        module.load_state_dict(load(data))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} can't be loaded ({reason}); remove {directory} and run the same command again"
        ) from error


def _kept_digest(directory: Path) -> str | None:
    """That of the weights in results.json; None where it says nothing."""
    path = directory / "results.json"
    return json.loads(path.read_bytes()).get("sha256") if path.exists() else None


def fingerprint(part: object) -> str:
    """sha256 of a module's tensors; the class name of anything else."""
    if isinstance(part, nn.Module):
        return hashlib.sha256(save(tensors_of(part))).hexdigest()
    return f"{type(part).__module__}.{type(part).__qualname__}"


def tensors_of(module: Stateful) -> dict[str, torch.Tensor]:
    """The tensors of its state on the CPU, for a file: each in memory of its own, also where a
    network uses one for two purposes.
    """
    state = module.state_dict()
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in state.items()}
