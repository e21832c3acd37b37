"""A posterior as plain diffusers loads it."""

from collections.abc import Mapping
from pathlib import Path

from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.lora import FILE, lora_layers, save_lora
from rtb_rl.adapters.pipelines import PipelinePrior, save_pipeline
from rtb_rl.training.diagnostics import trust

with extra("image"):
    from diffusers.models.unets.unet_2d import UNet2DModel

CARD = """# {target}: a posterior trained by rtb-rl

Its law is p(x) r(x)^beta / Z with beta = {beta}, p the pipeline it was made from and r = {target},
at {levels} levels and no others. {usage}

{trust}
"""
PLAIN = "`DDPMPipeline.from_pretrained(folder)(num_inference_steps={levels})` draws from it."
ADAPTERS = (
    "Give the U-Net of the prior's pipeline the mixin diffusers.loaders.PeftAdapterMixin, call"
    f' `unet.load_lora_adapter(folder, weight_name="{FILE}", prefix=None)` and sample as before.'
)
CLASSES = (
    "The call of DDPMPipeline has no classes: step through `pipeline.scheduler.timesteps` with"
    " `pipeline.unet(x, t, class_labels=labels)`, after `scheduler.set_timesteps({levels})`."
)
CHANNELS = (
    "The call of DDPMPipeline has no observation: step through `pipeline.scheduler.timesteps` with"
    " `pipeline.unet(torch.cat([x, observation], 1), t)`, the observation as channels of the"
    " image's size, after `scheduler.set_timesteps({levels})`."
)


def export_posterior(
    directory: Path,
    prior: PipelinePrior,
    unet: UNet2DModel,
    *,
    name: str,
    beta: float,
    diagnostics: Mapping[str, float],
) -> None:
    """Write lora/ for a network with adapters, else pipeline/, where it is not there yet."""
    levels = prior.diffusion.levels
    card = CARD.format(
        target=name,
        beta=beta,
        levels=levels,
        usage=_usage(unet).format(levels=levels),
        trust=trust(diagnostics),
    )
    if lora_layers(unet):
        folder = directory / "lora"
        if not (folder / FILE).exists():
            folder.mkdir(exist_ok=True)
            (folder / "README.md").write_text(card, encoding="utf-8")
            save_lora(folder, unet)
    elif not (directory / "pipeline").exists():
        save_pipeline(directory / "pipeline", unet, prior.pipeline.scheduler, card=card)


def _usage(unet: UNet2DModel) -> str:
    """How plain diffusers draws with this network."""
    if lora_layers(unet):
        return ADAPTERS
    if unet.class_embedding is not None:
        return CLASSES
    return PLAIN if unet.config["in_channels"] == unet.config["out_channels"] else CHANNELS
