"""A posterior as plain diffusers loads it."""

from collections.abc import Mapping
from pathlib import Path

from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.lora import FILE, lora_layers, save_lora
from rtb_rl.adapters.pipelines import PRIOR_UNET, PipelinePrior, last_steps, save_pipeline
from rtb_rl.adapters.schedulers import scheduler_grid
from rtb_rl.training.diagnostics import trust

with extra("image"):
    from diffusers.models.unets.unet_2d import UNet2DModel

CARD = """# {target}: a posterior trained by rtb-rl

Its law is p(x) r(x)^beta / Z with beta = {beta}, p the pipeline it was made from and r = {target},
at {levels} levels and no others. {usage}
{last}
{trust}
"""
PLAIN = "`DDPMPipeline.from_pretrained(folder)(num_inference_steps={levels})` draws from it."
ADAPTERS = (
    "Give the U-Net of the prior's pipeline the mixin diffusers.loaders.PeftAdapterMixin, call"
    f' `unet.load_lora_adapter(folder, weight_name="{FILE}", prefix=None)` and sample as before.'
)
LAST = """
Its last {steps} steps are the prior's{how}
"""
WITHOUT_ADAPTERS = (
    ": call `unet.disable_adapters()` before them and `unet.enable_adapters()` after."
)
OTHER_UNET = ": there call the U-Net in {folder}, as `prior(x, t)`."
SWITCHED = ". In `pipeline`, loaded from FOLDER:\n\n```python\n{switch}\n```"
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
    prior_steps: int = 0,
    diagnostics: Mapping[str, float],
) -> None:
    """Write lora/ for a network with adapters, else pipeline/, where it is not there yet.

    The last `prior_steps` steps are those of the prior, and the card says how to have them so.
    """
    levels = prior.diffusion.levels
    card = CARD.format(
        target=name,
        beta=beta,
        levels=levels,
        usage=_usage(unet).format(levels=levels),
        last=_last(prior, unet, prior_steps) if prior_steps else "",
        trust=trust(diagnostics),
    )
    if lora_layers(unet):
        folder = directory / "lora"
        if not (folder / FILE).exists():
            folder.mkdir(exist_ok=True)
            (folder / "README.md").write_text(card, encoding="utf-8")
            save_lora(folder, unet)
    elif not (directory / "pipeline").exists():
        save_pipeline(
            directory / "pipeline",
            unet,
            prior.pipeline.scheduler,
            card=card,
            prior_unet=prior.pipeline.unet if prior_steps else None,
        )


def _usage(unet: UNet2DModel) -> str:
    """How plain diffusers draws with this network."""
    if lora_layers(unet):
        return ADAPTERS
    if unet.class_embedding is not None:
        return CLASSES
    return PLAIN if unet.config["in_channels"] == unet.config["out_channels"] else CHANNELS


def _last(prior: PipelinePrior, unet: UNet2DModel, steps: int) -> str:
    """How plain diffusers leaves the last steps to the prior."""
    if lora_layers(unet):
        how = WITHOUT_ADAPTERS
    elif _usage(unet) != PLAIN:
        how = OTHER_UNET.format(folder=PRIOR_UNET)
    else:
        grid = scheduler_grid(prior.pipeline.scheduler, prior.diffusion.levels)
        how = SWITCHED.format(switch=last_steps(prior.pipeline.unet, int(grid.timesteps[steps])))
    return LAST.format(steps=steps, how=how)
