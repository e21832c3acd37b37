"""Image posteriors with relative trajectory balance: prior, classifier, posterior, comparison.

    rtb-rl run rtb_image --data digits --target even --out runs/even

Stages, each in a directory of its own under --out: prior/ (a DDPM of the images, or a pipeline of
yours with --prior), classifier/ (the reward), judge/ (a second classifier, never a reward),
reference/ (draws of the prior, weighted by the reward: the truth to compare with), posterior/
(fine-tuned to p(x) p(class | x)^beta / Z). The posterior's folder loads in plain diffusers.
"""

import time
from dataclasses import dataclass, replace

import torch
import tyro
from accelerate import Accelerator
from rich.console import Console

from rtb_rl.baselines import Draws
from rtb_rl.tasks.image import ImageSettings, fit_posterior, open_image_job
from rtb_rl.training import generator_for, trust


@dataclass(frozen=True)
class Settings(ImageSettings):
    """Image posteriors with relative trajectory balance."""

    lora_rank: int | None = None
    """Train adapters of this rank on the prior's own network instead of all weights of a copy."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""


def main(settings: Settings) -> None:
    """Fit what is not complete and compare the posterior with its reference."""
    job = open_image_job(settings, program="rtb_image")
    chosen = replace(
        job.budget.posterior,
        lora_rank=settings.lora_rank,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    posterior = fit_posterior(
        job.run.directory / "posterior", job.prior, job.target, chosen, seed=settings.seed
    )
    if not Accelerator().is_main_process:
        return
    diagnostics = posterior.results["diagnostics"]
    generator = generator_for(settings.seed, "samples", device=job.data.images.device)
    begun = time.monotonic()
    x0 = posterior.sampler.sample(job.condition, job.draws_each, generator=generator)
    draws = Draws(
        x0,
        job.prior.diffusion.levels,
        log_z=torch.tensor([diagnostics["log_z"]]),
        ess=torch.tensor([diagnostics["ess"]]),
    )
    row = job.compare(draws, time.monotonic() - begun)
    row["log_z_error"] = diagnostics["log_z_standard_error"]
    row["training_calls"] = posterior.results["network_calls"]
    first = x0 if job.condition is None else x0.flatten(0, 1)[:: job.draws_each // 4 or 1]
    job.finish({"rtb": row}, {"rtb": first})
    Console(width=100).print(f"posterior: {trust(diagnostics)}", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Settings))
