"""What is one process's own where several train together: its directory and its generators."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor


def own_directory(directory: Path, accelerator: Accelerator) -> Path:
    """Where this process keeps its run: the first in the directory itself."""
    rank = accelerator.process_index
    return directory / f"process_{rank}" if rank else directory


def own_name(name: str, accelerator: Accelerator) -> tuple[str | int, ...]:
    """The names of this process's generator: the first has that of a process alone."""
    rank = accelerator.process_index
    return (name, rank) if rank else (name,)


def first_of_all(accelerator: Accelerator, step: int) -> int:
    """The least of the processes' steps: what all of them have reached."""
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device))
    assert isinstance(steps, Tensor)
    return int(steps.min())


def sum_of_all(accelerator: Accelerator, count: int) -> int:
    """The sum of the processes' counts."""
    counts = accelerator.gather(torch.tensor([count], device=accelerator.device))
    assert isinstance(counts, Tensor)
    return int(counts.sum())
