"""Draws of the prior with their rewards: what every posterior of it is measured against."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from rtb_rl.adapters.text_to_image import TextToImagePrior
from rtb_rl.baselines.selection import ImportanceReference
from rtb_rl.tasks.text_to_image.target import PromptTarget
from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.progress import progress
from rtb_rl.training.run import Run
from rtb_rl.training.scoring import LOG_REWARD_FLOOR
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import fingerprint


@dataclass(frozen=True)
class PriorDraws:
    """Latents of the prior [prompts, n, C, h, w] and log r of each [prompts, n], nats."""

    x0: Tensor
    log_reward: Tensor
    seconds: float

    def weighted(self, beta: float) -> ImportanceReference:
        """With weights r^beta: prior * r^beta / Z of each prompt, with error bars."""
        return ImportanceReference(self.x0, beta * self.log_reward.double())


def prior_facts(prior: TextToImagePrior) -> dict[str, Any]:
    """What a run's configuration says of a prior: its network, its steps, how it is called."""
    return {
        "prior": fingerprint(prior.pipeline.unet),
        "levels": prior.diffusion.levels,
        "steps": fingerprint(prior.diffusion),
        "guidance": prior.guidance,
        "negative": prior.prompts.negative,
        "latents": list(prior.diffusion.event_shape),
        "precision": str(prior.precision),
    }


@torch.no_grad()
def prior_draws(
    directory: Path,
    prior: TextToImagePrior,
    target: PromptTarget,
    count: int,
    *,
    batch: int,
    seed: int,
    purpose: str = "prior draws",
) -> PriorDraws:
    """`count` draws of the prior for each prompt, `batch` at a time, kept in a directory.

    Those for another `purpose` are independent.
    """
    asked = {"draws": count, "batch": batch, "seed": seed, "reward": target.name}
    if purpose != "prior draws":
        asked["purpose"] = purpose
    run = Run(directory, {**asked, **prior_facts(prior), **target.prompts.facts})
    device, log_reward = prior.diffusion.signal.device, target.log_reward(prior)
    generator = generator_for(seed, purpose, device=device)

    def draw(condition: Tensor) -> dict[str, Tensor]:
        x0 = prior.sampler.sample(condition, 1, generator=generator)[:, 0]
        return {"x0": x0, "log_reward": log_reward(x0, condition).clamp(min=LOG_REWARD_FLOOR)}

    numbers = torch.arange(len(target.prompts), device=device)
    held, seconds = drawn_once(run, "draws", draw, numbers, count, batch=batch)
    return PriorDraws(held["x0"], held["log_reward"], seconds)


@torch.no_grad()
def drawn_once(
    run: Run,
    kind: str,
    draw: Callable[[Tensor], Mapping[str, Tensor]],
    numbers: Tensor,
    count: int,
    *,
    batch: int,
) -> tuple[dict[str, Tensor], float]:
    """`count` rows of each prompt in `numbers`, `batch` at a time, and the seconds that they took.

    `draw`: numbers of prompts [n] -> tensors [n, ...]; here [prompts, count, ...], on the device of
    `numbers`. Kept in the run as KIND.safetensors, and read from there where it is complete.
    """
    path = run.directory / f"{kind}.safetensors"
    parts, begun = defaultdict(list), time.monotonic()
    if run.results is None:
        each = numbers.repeat_interleave(count)
        with progress(f"{kind} of the prior", len(each)) as show:
            for place, part in enumerate(each.split(batch)):
                for key, value in draw(part).items():
                    parts[key].append(value.cpu())
                show(place * batch + len(part), "")
        whole = {key: torch.cat(some) for key, some in parts.items()}
        shaped = {k: v.reshape(len(numbers), count, *v.shape[1:]) for k, v in whole.items()}
        replace_file(path, save({key: value.contiguous() for key, value in shaped.items()}))
        run.finish({"seconds": time.monotonic() - begun})
    held = {key: value.to(numbers.device) for key, value in load(path.read_bytes()).items()}
    return held, (run.results or {})["seconds"]
