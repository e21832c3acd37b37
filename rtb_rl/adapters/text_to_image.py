"""Stable Diffusion pipelines as priors over latents, guided by prompts.

    pipeline = load_text_to_image("stable-diffusion-v1-5/stable-diffusion-v1-5", ancestral=True)
    prior = open_text_to_image(pipeline, ["A green rabbit."], levels=50)
    latents = prior.sampler.sample(torch.tensor([0]), 4, generator=generator)  # [1, 4, C, h, w]
    images = prior.decode(latents[0])

The guided model *is* the prior: what is sampled, and what a posterior is measured against.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.pipelines import reading_pipeline
from rtb_rl.adapters.prompts import (
    EncodedPrompts,
    Guided,
    PromptedUNet,
    Size,
    TextToImagePipeline,
    encode_prompts,
    size_in_pixels,
)
from rtb_rl.adapters.schedulers import (
    SchedulerGrid,
    diffusion_from_scheduler,
    scheduler_grid,
)
from rtb_rl.adapters.text_to_image_checks import PIPELINES, check_pipeline, warn_of_other_steps
from rtb_rl.adapters.unets import denoiser_from_output
from rtb_rl.core import GaussianDiffusion, Sampler
from rtb_rl.errors import InputError

with extra("text-to-image"):
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

HALF = (torch.float16, torch.bfloat16)
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}


@dataclass(frozen=True)
class TextToImagePrior:
    """A pipeline with its chain over latents [C, h, w] and its guided denoiser.

    The condition of the denoiser is int64 [batch], the number of a prompt in `prompts.texts`.
    `precision`: the dtype that the U-Net is evaluated in; None: that of its weights. `decode_batch`
    images pass through the VAE at a time.
    """

    diffusion: GaussianDiffusion
    denoiser: nn.Module
    pipeline: TextToImagePipeline
    prompts: EncodedPrompts
    guidance: float
    precision: torch.dtype | None
    grid: SchedulerGrid
    decode_batch: int = 8

    @property
    def sampler(self) -> Sampler:
        return Sampler(self.diffusion, self.denoiser)

    def decode(self, x0: Tensor) -> Tensor:
        """Latents [n, C, h, w] as images: float32 [n, 3, H, W] in [0, 1].

        What the pipeline shows, before any safety checker or watermark. Differentiable where x0
        needs a gradient; without a graph else.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and x0.requires_grad):
            parts = x0.split(self.decode_batch)
            return torch.cat([_decoded(self.pipeline.vae, part) for part in parts])


def load_text_to_image(
    source: str | Path, *, ancestral: bool = False, dtype: torch.dtype = torch.float32
) -> TextToImagePipeline:
    """The Stable Diffusion (1.x, 2.x) or SDXL pipeline in a folder, or on the hub under an id.

    `ancestral`: with the scheduler of `ancestral_scheduler`, for a published one that is refused,
    as that of SD 1.5 is. A safety checker is left out, with a warning: it turns images black, and
    a reward would learn from that. Raises InputError where there is no pipeline, or one of another
    kind.
    """
    index = _read_index(source)
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise InputError(
            f"{str(source)!r} holds a {kind}, not a text-to-image pipeline that can be fine-tuned"
            f" here; give one of {', '.join(PIPELINES)}"
        )
    settings: dict[str, Any] = {}
    if kind == StableDiffusionPipeline.__name__:
        settings = {"safety_checker": None, "requires_safety_checker": False}
    with reading_pipeline(source):
        pipeline = PIPELINES[kind].from_pretrained(str(source), **settings)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and part.dtype != dtype:  # diffusers warns of any cast
            part.to(dtype)
    if ancestral:
        pipeline.register_modules(scheduler=ancestral_scheduler(pipeline.scheduler))
    if any(index.get("safety_checker") or ()):
        warnings.warn(
            f"the safety checker of {str(source)!r} is left out, so that no reward sees the black"
            " images that it makes; filter what you show",
            stacklevel=2,
        )
    return pipeline


def ancestral_scheduler(scheduler: Any) -> DDIMScheduler:
    """A DDIM scheduler of the same levels of noise, to be sampled at eta 1 (arXiv 2010.02502).

    Raises InputError for a scheduler on another scale of noise.
    """
    ancestral: Any = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    own = getattr(scheduler, "alphas_cumprod", None)
    theirs = ancestral.alphas_cumprod
    if own is None or own.shape != theirs.shape or not torch.allclose(own, theirs, atol=1e-6):
        raise InputError(
            f"{type(scheduler).__name__} has no levels of noise that a DDIMScheduler could take"
            " over; give a pipeline that was trained with a table of betas"
        )
    return ancestral


def open_text_to_image(
    pipeline: TextToImagePipeline,
    texts: Sequence[str],
    *,
    levels: int,
    guidance: float = 7.5,
    negative: str = "",
    size: Size | None = None,
    last_std: float | None = None,
    precision: torch.dtype | None = None,
    decode_batch: int = 8,
) -> TextToImagePrior:
    """The chain of `levels` guided steps that the pipeline runs at eta 1, with densities.

    For the same generator `core.rollout` draws the latents of `pipeline(texts,
    num_inference_steps=levels, eta=1.0, guidance_scale=guidance, output_type="latent")`, but for
    the noise of the last step where the scheduler adds none. All weights of the pipeline are
    frozen. SD 1.x leaves signal 0.068 or more at the last level: see `StartStep`.

    `size`: pixels, or (height, width); the U-Net's own unless given. `last_std` as in
    `diffusion_from_scheduler`, `precision` as in UNetDenoiser; weights in half precision are
    evaluated in it. Raises InputError for a pipeline, a scheduler or a size that doesn't fit.
    """
    check_pipeline(pipeline, guidance)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    height, width = size_in_pixels(pipeline, size)
    factor = pipeline.vae_scale_factor
    shape = (unet.config["in_channels"], height // factor, width // factor)
    diffusion = diffusion_from_scheduler(scheduler, shape, levels=levels, last_std=last_std)
    grid = scheduler_grid(scheduler, levels)
    warn_of_other_steps(scheduler, grid)
    _freeze(pipeline)
    prompts = encode_prompts(pipeline, texts, negative=negative, size=(height, width))
    precision = precision or (unet.dtype if unet.dtype in HALF else None)
    network = PromptedUNet(unet, grid.timesteps, prompts, precision=precision)
    denoiser = Guided(denoiser_from_output(network, scheduler, grid), guidance)
    return TextToImagePrior(
        diffusion.to(unet.device),
        denoiser.to(unet.device),
        pipeline,
        prompts,
        guidance,
        precision,
        grid,
        decode_batch,
    )


def posterior_denoiser(prior: TextToImagePrior, unet: nn.Module) -> nn.Module:
    """The prior's denoiser with another U-Net in it: same prompts, guidance and precision."""
    network = PromptedUNet(unet, prior.grid.timesteps, prior.prompts, precision=prior.precision)
    inner = denoiser_from_output(network, prior.pipeline.scheduler, prior.grid)
    return Guided(inner, prior.guidance).to(prior.diffusion.signal.device)


def _read_index(source: str | Path) -> dict[str, Any]:
    """model_index.json, with a word on an id that many still use."""
    try:
        with reading_pipeline(source):
            index: Any = DiffusionPipeline.load_config(str(source))
            return index
    except InputError as error:
        if (now := MOVED.get(str(source))) is None:
            raise
        raise InputError(f"{error}. This id is gone from the hub: use {now!r}") from error


def _freeze(pipeline: TextToImagePipeline) -> None:
    """No gradient and no dropout anywhere, and a VAE that does not overflow."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    if pipeline.vae.dtype == torch.float16 and pipeline.vae.config.get("force_upcast"):
        pipeline.vae.float()  # as the pipeline does in each call


def _decoded(vae: Any, x0: Tensor) -> Tensor:
    """Images of one batch; SDXL's VAE may have a mean and a spread of its latents as well."""
    config = vae.config
    latents = x0.to(vae.dtype) / config["scaling_factor"]
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        latents = latents * latents.new_tensor(std).reshape(-1, 1, 1)
        latents = latents + latents.new_tensor(mean).reshape(-1, 1, 1)
    image = vae.decode(latents + (config.get("shift_factor") or 0.0)).sample
    return (image.float() * 0.5 + 0.5).clamp(0, 1)
