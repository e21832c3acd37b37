"""A start for fine-tuning: rewarded draws of the prior, and a denoiser of their target."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtb_rl.adapters.pipelines import PipelinePrior
from rtb_rl.errors import InputError
from rtb_rl.tasks.image.prior import prior_draws
from rtb_rl.tasks.image.target import ImageTarget
from rtb_rl.training.rewarded import RewardedSettings
from rtb_rl.training.rewarded_draws import RewardedDraws
from rtb_rl.training.rewarded_stage import fit_rewarded
from rtb_rl.training.task import Task

CLASSES = "class_embedding"


def fit_start(
    directory: Path,
    prior: PipelinePrior,
    target: ImageTarget,
    task: Task,
    settings: RewardedSettings | None,
    beta: float,
    networks: Iterable[nn.Module],
    seed: int,
) -> dict[str, Any]:
    """Start `task.posterior`; what it took, seconds and calls of `networks`, and
    how many last steps it leaves to the prior.

    The directory keeps draws of the prior and the started posterior; each is skipped when complete.
    Without settings it stays as it is, and nothing is returned. InputError for a target whose
    conditions can't be counted.
    """
    if settings is None:
        return {}
    x0 = prior_draws(directory / "draws", prior, settings.draws, seed=seed, purpose="start")
    drawn = json.loads((directory / "draws" / "results.json").read_text())
    draws = RewardedDraws.of_one_prior(task, x0, start_conditions(target, x0.device), beta)
    fresh = [p for name, p in task.posterior.named_parameters() if CLASSES in name]
    found = fit_rewarded(
        directory / "denoiser",
        task,
        draws,
        settings,
        beta=beta,
        networks=networks,
        new_inputs=fresh,
        seed=seed,
    )
    return {
        **found,
        "seconds": drawn["seconds"] + found["seconds"],
        "network_calls": len(x0) * prior.diffusion.levels + found["network_calls"],
    }


def start_conditions(target: ImageTarget, device: torch.device) -> Tensor | None:
    """All that there are; InputError where they can't be counted."""
    if not target.is_conditional:
        return None
    if target.classes is None:
        raise InputError(
            f"target {target.name!r} has conditions without number, and rewarded draws are weighed"
            " for each condition; leave the start out, or denoise draws given their observations"
        )
    return torch.arange(target.classes, device=device)
