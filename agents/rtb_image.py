"""Image posteriors with relative trajectory balance: prior, classifier, posterior, comparison.

    rtb-rl run rtb_image --data digits --target even --out runs/even

Stages, each in a directory of its own under --out: prior/ (a DDPM of the images, or a pipeline of
yours with --prior), classifier/ (the reward), judge/ (a second classifier, never a reward),
reference/ (draws of the prior, weighted by the reward: the truth to compare with), posterior/
(fine-tuned to p(x) p(class | x)^beta / Z). The posterior's folder loads in plain diffusers.
"""

from dataclasses import dataclass
from functools import partial

import tyro
from accelerate import Accelerator
from rich.console import Console

from rtb_rl.tasks.image import ImageSettings, fit_posterior, open_image_job
from rtb_rl.training import trust


@dataclass(frozen=True)
class Settings(ImageSettings):
    """Image posteriors with relative trajectory balance."""

    lora_rank: int | None = None
    """Train adapters of this rank on the prior's own network instead of all weights of a copy."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""


def main(settings: Settings) -> None:
    """Fit what is not complete and compare the posterior with its reference."""
    job = open_image_job(
        settings,
        program="rtb_image",
        lora_rank=settings.lora_rank,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    directory, chosen = job.run.directory / "posterior", job.budget.posterior
    posterior = fit_posterior(directory, job.prior, job.target, chosen, seed=settings.seed)
    if not Accelerator().is_main_process:
        return

    job.measure("rtb", partial(job.draw, posterior), posterior.results)
    by_weight = partial(job.draw_by_weight, posterior)
    job.measure("rtb, by weight", by_weight, posterior.results)
    job.finish(["rtb", "rtb, by weight"])
    verdict = trust(posterior.results["diagnostics"])
    Console(width=100).print(f"posterior: {verdict}", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Settings))
