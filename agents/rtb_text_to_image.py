"""Text-to-image posteriors with relative trajectory balance: prior, posterior, comparison.

    rtb-rl run rtb_text_to_image --out runs/shapes

fine-tunes a small Stable Diffusion of coloured shapes, which it trains first. With a pipeline and a
reward of your own:

    accelerate launch agents/rtb_text_to_image.py \\
        --prior stable-diffusion-v1-5/stable-diffusion-v1-5 --ancestral --learned-start \\
        --prompts "A green colored rabbit." --reward image-reward --half-precision --out runs/rabbit

Stages, each in a directory of its own under --out: prior/ (of shapes), reference/ (draws of the
prior, weighted by the reward: the truth to compare with), posterior/ (fine-tuned to
p(image | prompt) r(image, prompt)^beta / Z). Its lora/ or pipeline/ loads in plain diffusers.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import tyro
from accelerate import Accelerator
from rich.console import Console

from rtb_rl import InputError
from rtb_rl.tasks.text_to_image import (
    PRIOR,
    TextToImageSettings,
    fit_text_to_image,
    group_log_z,
    learned_log_z,
    open_text_to_image_job,
)
from rtb_rl.training import trust


@dataclass(frozen=True)
class Settings(TextToImageSettings):
    """Text-to-image posteriors with relative trajectory balance."""

    lora_rank: int | None = None
    """Rank of the adapters; not given: 4, and for shapes all weights of a copy are trained."""
    all_weights: bool = False
    """Train all weights of a copy of the U-Net, also of a pipeline that is given."""
    group_log_z: bool = False
    """log Z is the mean over a prompt's paths, instead of a network of its embedding."""
    per_dimension: bool = False
    """Count beta for each number of a latent, as the published code does."""
    learned_start: bool = False
    """Learn the law of the first noise, for a pipeline that keeps signal at its last level."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    eight_bit: bool = False
    """Moments of the optimiser in 8 bits, by bitsandbytes."""


def chosen(settings: Settings) -> dict[str, Any]:
    """What the flags change of the posterior's settings; InputError for a rank that is none."""
    rank = settings.lora_rank
    if rank is not None and (rank < 1 or settings.all_weights):
        raise InputError(
            f"lora_rank {rank} doesn't go with all_weights; give one of them"
            if settings.all_weights
            else f"adapters of rank {rank} hold nothing; give 1 or more, or all_weights"
        )
    flags = ("per_dimension", "learned_start", "gradient_checkpointing", "eight_bit")
    changed: dict[str, Any] = {name: True for name in flags if getattr(settings, name)}
    if rank is not None or settings.all_weights:
        changed["lora_rank"] = rank
    return changed


def main(settings: Settings) -> None:
    """Make what is not complete and compare the posterior with its reference."""
    make_log_z = group_log_z if settings.group_log_z else learned_log_z
    job = open_text_to_image_job(
        settings, program="rtb_text_to_image", make_log_z=make_log_z, **chosen(settings)
    )
    directory, how = job.run.directory / "posterior", job.budget.posterior
    posterior = fit_text_to_image(directory, job.prior, job.target, how, seed=settings.seed)
    if not Accelerator().is_main_process:
        return

    job.add(PRIOR, job.draw_prior)
    job.add("rtb", partial(job.draw, posterior), posterior.results)
    by_weight = partial(job.draw_by_weight, posterior)
    job.add("rtb, by weight", by_weight, posterior.results)
    job.finish([PRIOR, "rtb", "rtb, by weight"])
    verdict = trust(posterior.results["diagnostics"])
    Console(width=100).print(f"posterior: {verdict}", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Settings))
