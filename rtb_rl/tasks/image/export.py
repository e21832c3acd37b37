"""A posterior as plain diffusers loads it."""

from collections.abc import Mapping
from pathlib import Path

from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.lora import lora_layers, save_lora
from rtb_rl.adapters.pipelines import PipelinePrior, save_pipeline
from rtb_rl.training.diagnostics import trust

with extra("image"):
    from diffusers.models.unets.unet_2d import UNet2DModel

CARD = """# {target}: a posterior trained by rtb-rl

The law of this pipeline is p(x) r(x)^beta / Z with beta = {beta}, p the pipeline it was made from
and r = {target}, at {levels} levels and no others:
`DDPMPipeline.from_pretrained(folder)(num_inference_steps={levels})`.

{trust}
"""


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
    card = CARD.format(
        target=name, beta=beta, levels=prior.diffusion.levels, trust=trust(diagnostics)
    )
    folder = directory / ("lora" if lora_layers(unet) else "pipeline")
    if folder.exists():
        return
    if lora_layers(unet):
        save_lora(folder, unet)
        (folder / "README.md").write_text(card, encoding="utf-8")
    else:
        save_pipeline(folder, unet, prior.pipeline.scheduler, card=card)
