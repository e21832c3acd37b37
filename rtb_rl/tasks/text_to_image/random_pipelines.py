"""Stable Diffusion pipelines with random weights: as large as the published ones, or small.

    pipeline = random_pipeline(SMALL, generator=generator_for(0, "networks"))

What is measured of them, such as the cost of an update, doesn't depend on the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, nn

from rtb_rl.adapters.extras import extra
from rtb_rl.nn.initial import initialise
from rtb_rl.tasks.text_to_image.shapes_networks import new_tokenizer

with extra("text-to-image"):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class Networks:
    """The configs of the three networks of a Stable Diffusion 1.x pipeline."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]


STABLE_DIFFUSION = Networks(
    unet={
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,  # in this class the number of heads
    },
    vae={
        "sample_size": 512,
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    },
    text={
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "max_position_embeddings": 77,
    },
)
"""Those of SD 1.5: 512 x 512 pixels, a text encoder as in CLIP ViT-L/14; 1.07e9 parameters."""

SMALL = Networks(
    unet={
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    },
    vae={
        "sample_size": 32,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 8,
    },
    text={
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "projection_dim": 32,
        "max_position_embeddings": 16,
    },
)
"""Of the same kind, for a CPU: latents 4 x 16 x 16, images of 32 x 32 pixels."""


def random_pipeline(networks: Networks, *, generator: Generator) -> StableDiffusionPipeline:
    """An untrained pipeline with all weights from the generator, on its device.

    It knows the words of shapes; any other falls into letters.
    """
    device = generator.device
    tokenizer = new_tokenizer()
    tokenizer.model_max_length = networks.text["max_position_embeddings"]
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type=device.type), device:  # weights are replaced
        modules = new_modules(networks, tokenizer)
    for module in modules.values():
        initialise(module, generator=generator)
        for layer in module.modules():
            if isinstance(layer, nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02, generator=generator)
    parts: dict[str, Any] = {**modules, "tokenizer": tokenizer, "scheduler": new_scheduler()}
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts)


def new_modules(networks: Networks, tokenizer: CLIPTokenizer) -> dict[str, nn.Module]:
    """U-Net, autoencoder and text encoder as diffusers' and transformers' classes start."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    text: Any = CLIPTextConfig(**networks.text, **special, hidden_act="quick_gelu")
    return {
        "unet": UNet2DConditionModel(**networks.unet),
        "vae": AutoencoderKL(**networks.vae, latent_channels=4),
        "text_encoder": CLIPTextModel(text),
    }


def new_scheduler() -> DDIMScheduler:
    """That of SD 1.x, to be sampled at eta 1."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
