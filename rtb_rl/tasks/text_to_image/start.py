"""A start for fine-tuning: rewarded draws of the prior, and a denoiser of their target."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtb_rl.adapters.text_to_image import TextToImagePrior
from rtb_rl.tasks.text_to_image.reference import prior_draws
from rtb_rl.tasks.text_to_image.target import PromptTarget
from rtb_rl.training.rewarded import RewardedSettings
from rtb_rl.training.rewarded_draws import RewardedDraws
from rtb_rl.training.rewarded_stage import fit_rewarded
from rtb_rl.training.task import Task


def fit_start(
    directory: Path,
    prior: TextToImagePrior,
    target: PromptTarget,
    task: Task,
    settings: RewardedSettings | None,
    beta: float,
    networks: Iterable[nn.Module],
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """Start `task.posterior`; what it took, seconds and calls of `networks`, and
    how many last steps it leaves to the prior.

    The directory keeps draws of the prior, `batch` drawn at a time, and the started posterior; each
    is skipped when complete. Without settings it stays as it is, and nothing is returned.
    InputError for a task with a learned law of the first noise.
    """
    if settings is None:
        return {}
    prompts = torch.arange(len(target.prompts), device=prior.diffusion.signal.device)
    count = -(-settings.draws // len(prompts))
    held = prior_draws(
        directory / "draws", prior, target, count, batch=batch, seed=seed, purpose="start"
    )
    draws = RewardedDraws.of_each_prior(held.x0, prompts, held.log_reward, beta)
    place, given = directory / "denoiser", {"beta": beta, "networks": networks, "seed": seed}
    found = fit_rewarded(place, task, draws, settings, **given)
    return {
        **found,
        "seconds": held.seconds + found["seconds"],
        "network_calls": len(draws.x0) * task.diffusion.levels + found["network_calls"],
    }
