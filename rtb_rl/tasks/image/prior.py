"""Image priors: a small U-Net trained here, or any unconditional DDPM pipeline."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Generator, Tensor, nn

from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.pipelines import PipelinePrior, load_pipeline, open_pipeline, save_pipeline
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.nn.initial import initialise
from rtb_rl.tasks.image.images import ImageDataset, to_model_space
from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.loop import train
from rtb_rl.training.pretrain import Pretrainer, PretrainSettings
from rtb_rl.training.progress import progress
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import device_for_training, fingerprint

with extra("image"):
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

PIPELINE, DRAWS = "pipeline", "draws.safetensors"
BATCH = 250  # images drawn at once

CARD = """# {name}: an unconditional DDPM trained by rtb-rl

`DDPMPipeline.from_pretrained(folder)(num_inference_steps={levels})`; it was trained at these levels
and has no others.
"""


@dataclass(frozen=True)
class PriorSettings:
    """A U-Net with few levels, and how it is trained."""

    widths: tuple[int, ...] = (32, 48)
    """Channels at each resolution, halved from one to the next."""
    attention: bool = True
    """Self-attention in the blocks of the lowest resolution; between them there always is."""
    levels: int = 20
    pretrain: PretrainSettings = field(
        default_factory=lambda: PretrainSettings(steps=3000, batch=128)
    )
    half_precision: bool = False
    """Evaluate the network in bfloat16, here and in every posterior of this prior."""

    @property
    def precision(self) -> torch.dtype | None:
        return torch.bfloat16 if self.half_precision else None


def new_unet(
    shape: tuple[int, int, int], settings: PriorSettings, *, generator: Generator
) -> UNet2DModel:
    """An untrained U-Net for images of this shape.

    InputError for images whose sides can't be halved as often as there are widths.
    """
    channels, height, width = shape
    blocks = len(settings.widths)
    if height % 2 ** (blocks - 1) or width % 2 ** (blocks - 1):
        raise InputError(
            f"images of {height} x {width} can't be halved {blocks - 1} times for the widths"
            f" {settings.widths}; give fewer widths"
        )
    last = ["Attn" * settings.attention]
    with torch.random.fork_rng(devices=[]):  # the first weights are replaced
        unet = UNet2DModel(
            sample_size=(height, width),  # type: ignore[arg-type]
            in_channels=channels,
            out_channels=channels,
            block_out_channels=settings.widths,
            layers_per_block=1,
            down_block_types=tuple(f"{a}DownBlock2D" for a in [""] * (blocks - 1) + last),
            up_block_types=tuple(f"{a}UpBlock2D" for a in last + [""] * (blocks - 1)),
            norm_num_groups=8,
            attention_head_dim=16,
        )
    initialise(unet, generator=generator)
    nn.init.zeros_(unet.conv_out.weight)
    return unet


def new_scheduler(levels: int) -> DDPMScheduler:
    """A cosine schedule of its own for so many levels (arXiv 2102.09672), velocity prediction.

    InputError for none.
    """
    if levels < 1:
        raise InputError(f"a chain of {levels} levels has no step; give 1 level or more")
    return DDPMScheduler(
        num_train_timesteps=levels,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
    )


def fit_prior(
    directory: str | Path,
    dataset: ImageDataset,
    settings: PriorSettings | None = None,
    *,
    seed: int = 0,
) -> PipelinePrior:
    """A diffusion of the data set's images; its folder `pipeline` loads in plain diffusers."""
    settings = settings or PriorSettings()
    facts = {"data": dataset.name, "data_sha256": dataset.sha256, "shape": dataset.shape}
    run = Run(directory, {**facts, "prior": asdict(settings), "seed": seed})
    folder = run.directory / PIPELINE
    if run.results is None:
        run.finish(_train(run, folder, dataset, settings, seed))
    pipeline = load_pipeline(folder)
    pipeline.unet.to(device_for_training())  # type: ignore[arg-type]
    return _frozen(open_pipeline(pipeline, levels=settings.levels, precision=settings.precision))


def _train(
    run: Run, folder: Path, dataset: ImageDataset, settings: PriorSettings, seed: int
) -> dict[str, Any]:
    device = device_for_training()
    data = dataset.to(device)
    initial = generator_for(seed, "prior", "initial")
    unet = new_unet(dataset.shape, settings, generator=initial).to(device)  # type: ignore[arg-type]
    scheduler = new_scheduler(settings.levels)
    untrained = open_pipeline(
        DDPMPipeline(unet, scheduler), levels=settings.levels, precision=settings.precision
    )

    def draw(n: int, *, generator: Generator) -> tuple[Tensor, Condition]:
        images, _ = data.sample(n, generator=generator)
        return to_model_space(images), None

    generator = generator_for(seed, "prior", device=device)
    trainer = Pretrainer(
        untrained.diffusion.to(device),
        untrained.denoiser.to(device),
        draw,
        settings.pretrain,
        generator=generator,
    )
    seconds = train(
        run,
        trainer.update,
        trainer.parts,
        steps=settings.pretrain.steps,
        description="prior",
        checkpoint_every=500,
    )
    untrained.denoiser.load_state_dict(trainer.average.module.state_dict())
    save_pipeline(
        folder, unet, scheduler, card=CARD.format(name=dataset.name, levels=settings.levels)
    )
    parameters = sum(p.numel() for p in unet.parameters())
    return {"seconds": seconds, "parameters": parameters, "sha256": fingerprint(unet)}


def foreign_prior(
    source: str | Path,
    shape: tuple[int, int, int] | None = None,
    *,
    levels: int,
    unclipped: bool = False,
    precision: torch.dtype | None = None,
) -> PipelinePrior:
    """The pipeline in a folder or on the hub, sampled with `levels` steps.

    `unclipped` samples without the clipping that its scheduler asks for: another prior than the
    published one, slightly; without it such a pipeline is refused. InputError for images of another
    shape than `shape`.
    """
    pipeline = load_pipeline(source)
    if pipeline.scheduler.config.get("clip_sample") and not unclipped:
        raise InputError(
            f"the pipeline {str(source)!r} clips its predictions (clip_sample=True), and such steps"
            " have no Gaussian density; set unclipped to sample it without"
        )
    if unclipped:
        pipeline.scheduler = pipeline.scheduler.from_config(
            pipeline.scheduler.config, clip_sample=False
        )
    pipeline.unet.to(device_for_training())  # type: ignore[arg-type]
    prior = open_pipeline(pipeline, levels=levels, precision=precision)
    made = tuple(prior.diffusion.event_shape)
    if shape is not None and made != tuple(shape):
        raise InputError(
            f"the pipeline {str(source)!r} makes images of {made}, the data holds images of"
            f" {tuple(shape)}; give data and prior of one shape"
        )
    return _frozen(prior)


def prior_draws(
    directory: str | Path,
    prior: PipelinePrior,
    count: int,
    *,
    seed: int,
    purpose: str = "draws",
) -> Tensor:
    """`count` draws of the prior in model space, [count, C, H, W], kept in a directory.

    Those for another `purpose` are independent.
    """
    config = {"draws": count, "prior": fingerprint(prior.denoiser), "seed": seed}
    if purpose != "draws":
        config["purpose"] = purpose
    run = Run(directory, {**config, "levels": prior.diffusion.levels})
    path = run.directory / DRAWS
    if run.results is None:
        begun = time.monotonic()
        generator = generator_for(seed, purpose, device=prior.diffusion.signal.device)
        drawn = []
        with progress("draws of the prior", count) as show:
            while (done := sum(map(len, drawn))) < count:
                rows = min(BATCH, count - done)
                drawn.append(prior.sampler.sample(None, rows, generator=generator))
                show(done + rows, "")
        replace_file(path, save({"x0": torch.cat(drawn).cpu()}))
        run.finish({**config, "seconds": time.monotonic() - begun})
    return load(path.read_bytes())["x0"].to(prior.diffusion.signal.device)


def _frozen(prior: PipelinePrior) -> PipelinePrior:
    device = prior.pipeline.unet.device
    prior.diffusion.to(device)
    prior.denoiser.to(device).requires_grad_(False).eval()
    return prior
