"""A small Stable Diffusion pipeline that knows the world of shapes, trained here.

All of it is real: AutoencoderKL, CLIPTextModel and CLIPTokenizer, UNet2DConditionModel and a
DDIMScheduler. Sample it with num_inference_steps=20 and eta=1.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Generator, Tensor

from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.pipelines import reading_pipeline, replacing
from rtb_rl.adapters.schedulers import diffusion_from_scheduler, scheduler_grid
from rtb_rl.core import VelocityPrediction
from rtb_rl.core.protocols import Condition
from rtb_rl.tasks.text_to_image.shapes import draw_captions, facts
from rtb_rl.tasks.text_to_image.shapes_autoencoder import (
    AutoencoderSettings,
    Latents,
    encode_world,
    fit_autoencoder,
)
from rtb_rl.tasks.text_to_image.shapes_networks import (
    TIMESTEPS,
    CaptionVelocity,
    new_autoencoder,
    new_scheduler,
    new_text_encoder,
    new_tokenizer,
    new_unet,
    token_ids,
)
from rtb_rl.training.loop import train
from rtb_rl.training.pretrain import Pretrainer, PretrainSettings
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import complete, device_for_training, fingerprint

with extra("text-to-image"):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )

PIPELINE = "pipeline"

CARD = """# Coloured shapes: a small Stable Diffusion pipeline trained by rtb-rl

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline("a red circle", num_inference_steps=20, eta=1.0, guidance_scale=2.0).images

16 x 16 pixels; prompts are "a red circle" and the like, or less: "a red shape", "a circle",
"a shape", "". Colours: red, green, blue, yellow; shapes: circle, square, triangle.
"""


@dataclass(frozen=True)
class ShapesPriorSettings:
    """The networks of the pipeline, and how they are trained: about ten minutes on one core."""

    widths: tuple[int, ...] = (32, 64)
    """Channels of the U-Net at either resolution."""
    text_width: int = 32
    images: int = 40_000
    """Of the world, drawn and encoded once; the U-Net is trained on them."""
    autoencoder: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    pretrain: PretrainSettings = field(
        default_factory=lambda: PretrainSettings(steps=6000, batch=64, learning_rate=2e-3)
    )


def new_shapes_pipeline(
    settings: ShapesPriorSettings, *, generator: Generator
) -> StableDiffusionPipeline:
    """The untrained pipeline; all weights come from the generator, which is on the CPU."""
    tokenizer = new_tokenizer()
    return StableDiffusionPipeline(
        vae=new_autoencoder(settings.autoencoder.widths, generator=generator),
        text_encoder=new_text_encoder(tokenizer, settings.text_width, generator=generator),
        tokenizer=tokenizer,
        unet=new_unet(settings.widths, settings.text_width, generator=generator),
        scheduler=new_scheduler(),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def fit_shapes_prior(
    directory: str | Path, settings: ShapesPriorSettings | None = None, *, seed: int = 0
) -> StableDiffusionPipeline:
    """The pipeline trained in this directory, or loaded from its folder `pipeline`; frozen.

    First the autoencoder, then U-Net and text encoder together; each in a stage of its own.
    """
    settings = settings or ShapesPriorSettings()
    run = Run(directory, {"prior": asdict(settings), "world": facts(), "seed": seed})
    folder = run.directory / PIPELINE
    if run.results is None:
        initial = generator_for(seed, "shapes prior", "initial")
        pipeline = new_shapes_pipeline(settings, generator=initial)
        results = _fit(run, pipeline, settings, seed)
        _save(folder, pipeline)
        run.finish(results)
    with reading_pipeline(folder):
        pipeline = StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    for network in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        network.requires_grad_(False).eval()
    return pipeline.to(device_for_training())


def _fit(
    run: Run, pipeline: StableDiffusionPipeline, settings: ShapesPriorSettings, seed: int
) -> dict[str, Any]:
    """Train the parts of the pipeline in place; the results of the run."""
    device = device_for_training()
    pipeline.to(device)
    first = run.stage("autoencoder", {**asdict(settings.autoencoder), "seed": seed})
    generator = generator_for(seed, "shapes autoencoder", device=device)
    fit_autoencoder(first, pipeline.vae, settings.autoencoder, generator=generator)
    generator = generator_for(seed, "shapes latents", device=device)
    latents = encode_world(pipeline.vae, settings.images, generator=generator)
    pipeline.vae.register_to_config(scaling_factor=latents.scale)

    told = {"text_width": settings.text_width, "widths": settings.widths, "seed": seed}
    told |= {"images": settings.images, "autoencoder": fingerprint(pipeline.vae)}
    second = run.stage("unet", {**asdict(settings.pretrain), **told})
    generator = generator_for(seed, "shapes unet", device=device)
    fit_unet(second, pipeline, latents, settings.pretrain, generator=generator)
    return {
        "seconds": sum((stage.results or {})["seconds"] for stage in (first, second)),
        "parameters": sum(p.numel() for p in pipeline.unet.parameters()),
        "scaling_factor": latents.scale,
        "sha256": fingerprint(pipeline.unet),
    }


def fit_unet(
    run: Run,
    pipeline: StableDiffusionPipeline,
    latents: Latents,
    settings: PretrainSettings,
    *,
    generator: Generator,
) -> None:
    """Train U-Net and text encoder in this run's directory, or load them; both in place.

    The loss is that of all levels of the scheduler alike, with captions drawn anew.
    """
    scheduler, scale = pipeline.scheduler, pipeline.vae.config["scaling_factor"]
    grid = scheduler_grid(scheduler, TIMESTEPS)
    shape = latents.mean.shape[1:]
    diffusion = diffusion_from_scheduler(scheduler, shape, levels=TIMESTEPS).to(generator.device)
    network = CaptionVelocity(pipeline.unet, pipeline.text_encoder, grid.timesteps)
    network.to(generator.device).train()

    def draw(n: int, *, generator: Generator) -> tuple[Tensor, Condition]:
        drawn, cells = latents.sample(n, generator=generator)
        captions = draw_captions(cells, generator=generator)
        return scale * drawn, token_ids(pipeline.tokenizer, captions).to(drawn.device)

    def fit() -> dict[str, Any]:
        denoiser = VelocityPrediction(network, grid.schedule).to(generator.device)
        trainer = Pretrainer(diffusion, denoiser, draw, settings, generator=generator)
        seconds = train(
            run,
            trainer.update,
            trainer.parts,
            steps=settings.steps,
            description="U-Net",
            checkpoint_every=500,
        )
        denoiser.load_state_dict(trainer.average.module.state_dict())
        return {"seconds": seconds}

    complete(run, network, fit)


def _save(folder: Path, pipeline: StableDiffusionPipeline) -> None:
    """Write the folder in one step, with a card."""
    with replacing(folder, "model_index.json", "pipeline") as partial:
        pipeline.save_pretrained(partial)
        (partial / "README.md").write_text(CARD, encoding="utf-8")
