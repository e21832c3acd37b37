"""Text-to-image posteriors as plain diffusers loads them.

    pipeline = StableDiffusionPipeline.from_pretrained(prior)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.load_lora_weights(directory)
    pipeline(prompt, num_inference_steps=levels, eta=1.0, guidance_scale=guidance)

A folder of `save_pipeline_with` is loaded by from_pretrained instead, with its scheduler.
"""

import copy
from pathlib import Path

from torch import nn

from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.lora import FILE, lora_weights
from rtb_rl.adapters.pipelines import PRIOR_UNET, refuse_adapters, replacing
from rtb_rl.adapters.prompts import TextToImagePipeline

with extra("text-to-image"):
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers


def save_lora_weights(
    directory: str | Path, pipeline: TextToImagePipeline, unet: nn.Module, *, card: str
) -> None:
    """Write the LoRA layers of `unet` as `pipeline.load_lora_weights(directory)` reads them.

    The folder holds pytorch_lora_weights.safetensors and `card` as README.md. Replaces such a
    folder; raises InputError rather than any other, and for a U-Net without adapters.
    """
    weights, config = lora_weights(unet)
    with replacing(directory, FILE, "folder of LoRA weights") as partial:
        type(pipeline).save_lora_weights(
            partial,
            unet_lora_layers=convert_state_dict_to_diffusers(weights),
            unet_lora_adapter_metadata=config,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")


def save_pipeline_with(
    directory: str | Path,
    pipeline: TextToImagePipeline,
    unet: nn.Module,
    card: str,
    *,
    keep_prior: bool = False,
) -> None:
    """Write an ordinary folder of the pipeline with `unet` in it, and `card` as its README.md.

    With `keep_prior` the pipeline's own U-Net is inside, in PRIOR_UNET: see `last_steps`. For
    adapters give merged(unet). Replaces a pipeline that is there; raises InputError rather than
    any other folder.
    """
    refuse_adapters(unet)
    changed = copy.copy(pipeline)
    changed.register_modules(unet=unet)
    with replacing(directory, "model_index.json", "pipeline") as partial:
        changed.save_pretrained(partial)
        if keep_prior:
            pipeline.unet.save_pretrained(partial / PRIOR_UNET)
        (partial / "README.md").write_text(card, encoding="utf-8")
