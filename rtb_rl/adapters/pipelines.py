"""Unconditional diffusers pipelines as priors, and posteriors as such pipelines."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rtb_rl.adapters.extras import extra, without_progress
from rtb_rl.adapters.schedulers import (
    Scheduler,
    ddpm_scheduler,
    diffusion_from_scheduler,
    scheduler_grid,
)
from rtb_rl.adapters.unets import denoiser_from_unet
from rtb_rl.core import GaussianDiffusion, Sampler
from rtb_rl.errors import InputError

with extra("image"):
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

PIPELINES = ("DDPMPipeline", "DDIMPipeline")
PRIOR_UNET = "prior_unet"
LAST_STEPS = """own = pipeline.unet.forward
prior = {network}.from_pretrained(FOLDER, subfolder="{folder}")
pipeline.unet.forward = lambda x, t, *args, **more: (
    (prior if int(t) <= {timestep} else own)(x, t, *args, **more)
)"""


@dataclass(frozen=True)
class PipelinePrior:
    """A pipeline with its chain and its denoiser, whose U-Net is the pipeline's own.

    `precision`: the dtype that the network is evaluated in; None: that of its weights.
    """

    diffusion: GaussianDiffusion
    denoiser: nn.Module
    pipeline: DDPMPipeline
    precision: torch.dtype | None = None

    @property
    def sampler(self) -> Sampler:
        return Sampler(self.diffusion, self.denoiser)


def load_pipeline(source: str | Path) -> DDPMPipeline:
    """The unconditional DDPM or DDIM pipeline in a folder, or on the hub under an id.

    Its scheduler is as published: see `open_pipeline` for those that are refused. Raises InputError
    where there is no pipeline, or one of another kind.
    """
    with reading_pipeline(source):
        index = DDPMPipeline.load_config(str(source))
        assert isinstance(index, dict)
        if (kind := index.get("_class_name")) in PIPELINES:
            return DDPMPipeline.from_pretrained(str(source))
    raise InputError(
        f"{str(source)!r} holds a {kind}, not an unconditional pipeline; give one of"
        f" {', '.join(PIPELINES)}"
    )


def open_pipeline(
    pipeline: DDPMPipeline,
    *,
    levels: int,
    last_std: float | None = None,
    precision: torch.dtype | None = None,
) -> PipelinePrior:
    """The chain of `levels` steps that the pipeline runs, with densities, and its denoiser.

    For a network and a scheduler at hand, give `DDPMPipeline(unet, scheduler)`.
    `last_std` as in `diffusion_from_scheduler`, whose InputErrors it raises; `precision` as in
    UNetDenoiser.
    """
    unet, scheduler = pipeline.unet, pipeline.scheduler
    size = unet.config["sample_size"]
    if size is None:
        raise InputError("this U-Net has no sample_size; set it with unet.register_to_config(...)")
    shape = (unet.config["out_channels"], *((size, size) if isinstance(size, int) else size))
    diffusion = diffusion_from_scheduler(scheduler, shape, levels=levels, last_std=last_std)
    grid = scheduler_grid(scheduler, levels)
    denoiser = denoiser_from_unet(unet, scheduler, grid, precision=precision)
    device = unet.device
    return PipelinePrior(diffusion.to(device), denoiser.to(device), pipeline, precision)


def save_pipeline(
    directory: str | Path,
    unet: UNet2DModel,
    scheduler: Scheduler,
    *,
    card: str,
    prior_unet: UNet2DModel | None = None,
) -> None:
    """Write an ordinary DDPMPipeline folder with `card` as its README.md.

    `prior_unet`, for a posterior whose last steps are the prior's, goes into a folder of its own
    inside; see `last_steps`.

    `DDPMPipeline.from_pretrained(directory)(num_inference_steps=levels)` draws the paths of
    `core.rollout` for the same generator, but for the noise of the last step where the scheduler
    adds none. Replaces a pipeline that is there; raises InputError rather than any other folder.
    """
    refuse_adapters(unet)
    with replacing(directory, "model_index.json", "pipeline") as partial:
        DDPMPipeline(unet, ddpm_scheduler(scheduler)).save_pretrained(partial)
        if prior_unet is not None:
            prior_unet.save_pretrained(partial / PRIOR_UNET)
        (partial / "README.md").write_text(card, encoding="utf-8")


def last_steps(unet: nn.Module, timestep: int) -> str:
    """Python that lets the U-Net in PRIOR_UNET act in the steps of a loaded `pipeline` from this
    timestep of the scheduler on.
    """
    return LAST_STEPS.format(network=type(unet).__name__, folder=PRIOR_UNET, timestep=timestep)


def refuse_adapters(unet: nn.Module) -> None:
    """InputError for a U-Net that no ordinary pipeline folder can hold."""
    if any(".lora_A." in name for name in unet.state_dict()):
        raise InputError(
            "this U-Net has LoRA layers; save merged(unet) of rtb_rl.adapters.lora instead"
        )


@contextmanager
def reading_pipeline(source: str | Path) -> Iterator[None]:
    """Turn what diffusers says of a source that it can't read into an InputError; no bars."""
    try:
        with without_progress():
            yield
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"no diffusers pipeline can be read from {str(source)!r}: give a folder that"
            " save_pretrained wrote, or the id of a pipeline on the hub and a network connection"
            f" ({reason})"
        ) from error


@contextmanager
def replacing(directory: str | Path, marker: str, kind: str) -> Iterator[Path]:
    """A folder beside `directory`, to be written, that takes its place at the end.

    What is there must have the file `marker`, which makes it a `kind`; else InputError. No bars.
    """
    directory = Path(directory)
    partial, aside = (directory.with_name(f".{directory.name}.{end}") for end in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    if aside.exists() and not directory.exists():  # killed between the two renames below
        aside.rename(directory)
    if directory.exists() and not (directory / marker).is_file():
        raise InputError(f"{directory} exists and is no {kind}; give a new directory")
    with without_progress():
        yield partial
    shutil.rmtree(aside, ignore_errors=True)
    if directory.exists():
        directory.rename(aside)
    partial.rename(directory)
    shutil.rmtree(aside, ignore_errors=True)
