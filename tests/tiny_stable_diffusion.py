"""Tiny text-to-image pipelines of diffusers' own classes, with seeded weights and a tokenizer of
single characters.

Latents 4 x 8 x 8 by default, images 16 x 16; a prompt has at most 14 characters beside spaces.
"""

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WINDOW = 16
START, END = "<|startoftext|>", "<|endoftext|>"
LEVELS_OF_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}


def tiny_tokenizer() -> CLIPTokenizer:
    """One token a letter, digit or sign."""
    signs = string.ascii_lowercase + string.digits + string.punctuation
    tokens = [*signs, *(f"{sign}</w>" for sign in signs), START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=WINDOW)


def tiny_scheduler(**config: Any) -> DDIMScheduler:
    """That of SD 1.x, to be sampled at eta 1."""
    given = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **config}
    return DDIMScheduler(**{**LEVELS_OF_NOISE, **given})


def tiny_sd(seed: int = 0, *, scheduler: Any = None, **unet: Any) -> StableDiffusionPipeline:
    """Like SD 1.x: predicts noise. Settings of the U-Net's config replace those of BLOCKS."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "vae": _vae(),
            "text_encoder": CLIPTextModel(_text_config()),
            "tokenizer": tiny_tokenizer(),
            "unet": _unet(cross_attention_dim=16, **unet),
            "scheduler": scheduler or tiny_scheduler(),
            "safety_checker": None,
            "feature_extractor": None,
        }
    return _finished(StableDiffusionPipeline(**parts, requires_safety_checker=False))


def tiny_sd2(seed: int = 0, *, scheduler: Any = None, **unet: Any) -> StableDiffusionPipeline:
    """Like SD 2.x: predicts velocity. With its own scheduler no signal is left at the last level,
    and the last step has no noise.
    """
    scheduler = scheduler or tiny_scheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    return tiny_sd(seed, scheduler=scheduler, use_linear_projection=True, **unet)


def tiny_sdxl(seed: int = 0, *, scheduler: Any = None, **unet: Any) -> StableDiffusionXLPipeline:
    """Like SDXL: two text encoders, pooled text and the size of the image as further inputs."""
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
        "use_linear_projection": True,
        "cross_attention_dim": 32,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "vae": _vae(),
            "text_encoder": CLIPTextModel(_text_config()),
            "text_encoder_2": CLIPTextModelWithProjection(_text_config()),
            "tokenizer": tiny_tokenizer(),
            "tokenizer_2": tiny_tokenizer(),
            "unet": _unet(**{**added, **unet}),
            "scheduler": scheduler or tiny_scheduler(),
        }
    return _finished(StableDiffusionXLPipeline(**parts, add_watermarker=False))


def _finished(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipeline


def _vae() -> AutoencoderKL:
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
    }
    return AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=4, sample_size=16)


def _unet(**config: Any) -> UNet2DConditionModel:
    given = {"sample_size": 8, "in_channels": 4, "out_channels": 4}
    return UNet2DConditionModel(**{**BLOCKS, **given, **config})


def _text_config() -> CLIPTextConfig:
    """Of a text encoder whose weights are large enough that prompts differ."""
    vocabulary = tiny_tokenizer().get_vocab()
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=WINDOW,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        initializer_factor=5.0,
    )
