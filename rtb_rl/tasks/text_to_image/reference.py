"""Draws of the prior with their rewards: what every posterior of it is measured against."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from rtb_rl.adapters.text_to_image import TextToImagePrior
from rtb_rl.baselines.selection import ImportanceReference
from rtb_rl.core import conditions
from rtb_rl.tasks.text_to_image.target import PromptTarget
from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.progress import progress
from rtb_rl.training.run import Run
from rtb_rl.training.scoring import LOG_REWARD_FLOOR
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import fingerprint

FILE = "draws.safetensors"


@dataclass(frozen=True)
class PriorDraws:
    """Latents of the prior [prompts, n, C, h, w] and log r of each [prompts, n], nats."""

    x0: Tensor
    log_reward: Tensor
    seconds: float

    def weighted(self, beta: float) -> ImportanceReference:
        """With weights r^beta: prior * r^beta / Z of each prompt, with error bars."""
        return ImportanceReference(self.x0, beta * self.log_reward.double())


@torch.no_grad()
def prior_draws(
    directory: Path,
    prior: TextToImagePrior,
    target: PromptTarget,
    count: int,
    *,
    batch: int,
    seed: int,
) -> PriorDraws:
    """`count` draws of the prior for each prompt, `batch` at a time, kept in a directory."""
    facts = {"draws": count, "prior": fingerprint(prior.pipeline.unet), "seed": seed}
    chain = {"levels": prior.diffusion.levels, "guidance": prior.guidance, "batch": batch}
    chain |= {"latents": list(prior.diffusion.event_shape), "precision": str(prior.precision)}
    chain |= {"steps": fingerprint(prior.diffusion)}
    texts = {**target.prompts.facts, "negative": prior.prompts.negative}
    run = Run(directory, {**facts, **chain, **texts, "reward": target.name})
    path, device = run.directory / FILE, prior.diffusion.signal.device
    if run.results is None:
        begun = time.monotonic()
        generator = generator_for(seed, "prior draws", device=device)
        log_reward = target.log_reward(prior)
        numbers = torch.arange(len(target.prompts), device=device).repeat_interleave(count)
        parts = []
        with progress("draws of the prior", len(numbers)) as show:
            for condition in numbers.split(batch):
                x0 = prior.sampler.sample(condition, 1, generator=generator)[:, 0]
                parts.append((x0.cpu(), log_reward(x0, condition).cpu()))
                show(sum(len(x0) for x0, _ in parts), "")
        x0, rewards = (torch.cat(columns) for columns in zip(*parts, strict=True))
        kept = {"x0": x0, "log_reward": rewards.clamp(min=LOG_REWARD_FLOOR)}
        shaped = {k: v.reshape(len(target.prompts), count, *v.shape[1:]) for k, v in kept.items()}
        replace_file(path, save({name: tensor.contiguous() for name, tensor in shaped.items()}))
        run.finish({"seconds": time.monotonic() - begun})
    tensors = conditions.move(load(path.read_bytes()), device)
    assert isinstance(tensors, dict)
    return PriorDraws(tensors["x0"], tensors["log_reward"], (run.results or {})["seconds"])
