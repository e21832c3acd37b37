"""Which text-to-image pipelines can be priors, and why others can't."""

import math
import warnings

from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.prompts import TextToImagePipeline
from rtb_rl.adapters.schedulers import Scheduler, SchedulerGrid, check_scheduler
from rtb_rl.errors import InputError

with extra("text-to-image"):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
        StableDiffusionXLPipeline,
    )
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

PIPELINES = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}


def check_pipeline(pipeline: TextToImagePipeline, guidance: float) -> None:
    """InputError unless the pipeline's steps are those of a guided Gaussian chain."""
    if not isinstance(pipeline, tuple(PIPELINES.values())):
        raise InputError(
            f"{type(pipeline).__name__} is not one of {', '.join(PIPELINES)}; give one of those"
        )
    try:
        check_scheduler(pipeline.scheduler)
    except InputError as error:
        raise InputError(
            f"{error}; or load the pipeline with load_text_to_image(source, ancestral=True), which"
            " is --ancestral on the command line"
        ) from error
    if not 1 <= guidance < math.inf:
        raise InputError(
            f"guidance must be 1 (none) or more, not {guidance}: diffusers turns it off below"
        )
    _check_unet(pipeline)


def _check_unet(pipeline: TextToImagePipeline) -> None:
    """InputError for a U-Net that needs more than a text."""
    config, channels = pipeline.unet.config, pipeline.vae.config["latent_channels"]
    takes, returns = config["in_channels"], config["out_channels"]
    added = "text_time" if isinstance(pipeline, StableDiffusionXLPipeline) else None
    needs = [
        (
            takes != channels,
            f"takes {takes} channels, and a latent has {channels}: it also needs an image, as for"
            " inpainting",
        ),
        (
            returns != channels,
            f"returns {returns} channels, and a latent has {channels}: it also predicts a variance",
        ),
        (config["class_embed_type"] or config["num_class_embeds"], "needs class labels"),
        (
            config["time_cond_proj_dim"],
            "is told its guidance scale (time_cond_proj_dim), as consistency models are: its steps"
            " are not those of a diffusion",
        ),
        (
            config["addition_embed_type"] != added,
            f"has addition_embed_type={config['addition_embed_type']!r}, and"
            f" {type(pipeline).__name__} gives {added!r}",
        ),
        (config["encoder_hid_dim_type"], "needs images of an IP-Adapter, or another encoder"),
    ]
    if problems := [text for found, text in needs if found]:
        raise InputError(
            f"this pipeline's U-Net {'; it '.join(problems)}. Give a plain text-to-image pipeline"
        )


def warn_of_other_steps(scheduler: Scheduler, grid: SchedulerGrid) -> None:
    """Where DDIMScheduler takes t - T // K for the previous timestep and that is not the next."""
    if not isinstance(scheduler, DDIMScheduler):
        return
    trained, levels = int(scheduler.config["num_train_timesteps"]), grid.schedule.levels
    if bool((grid.timesteps[1:].diff() != trained // levels).any()):
        warnings.warn(
            f"with timestep_spacing={scheduler.config['timestep_spacing']!r} and {levels} steps of"
            f" {trained} plain diffusers does not step from one timestep to the next, and will not"
            ' draw from this law; use timestep_spacing="leading"',
            stacklevel=3,
        )
