"""The parts of a small Stable Diffusion pipeline for the world of shapes, untrained."""

import json
import string
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rtb_rl.adapters.extras import extra
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.nn.initial import initialise
from rtb_rl.tasks.text_to_image.shapes import SIZE, WORDS

with extra("text-to-image"):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WINDOW = 8  # tokens, begin and end among them
BEGIN, END, LAST = "<|startoftext|>", "<|endoftext|>", "</w>"
TIMESTEPS = 1000
LATENT_CHANNELS, LATENT_SIZE = 4, SIZE // 2
GROUPS, HEADS = 8, 4


class CaptionVelocity(nn.Module):
    """The velocity that a U-Net predicts for tokens: a network for VelocityPrediction.

    The condition: int64 [batch, WINDOW], ids of tokens. `timesteps` as in a SchedulerGrid.
    """

    timesteps: Tensor

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, timesteps: Tensor):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.register_buffer("timesteps", timesteps, persistent=False)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        words = self.text_encoder(condition)[0]
        return self.unet(x, self.timesteps[level], encoder_hidden_states=words).sample


def new_tokenizer() -> CLIPTokenizer:
    """Each of WORDS is one token; any other word falls into letters."""
    merges = word_merges(WORDS)
    letters = [*string.ascii_lowercase, *(letter + LAST for letter in string.ascii_lowercase)]
    tokens = [*letters, *("".join(pair) for pair in merges), BEGIN, END]
    with TemporaryDirectory() as folder:
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n")
        vocabulary = {token: i for i, token in enumerate(tokens)}
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=WINDOW)


def word_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges of byte-pair encoding after which each word is one piece, in order of their rank."""
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + LAST]
        for pair in merges:
            pieces = _merged(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merged(pieces, merges[-1])
    return merges


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """What Stable Diffusion makes of prompts: int64 [n, WINDOW]."""
    kept = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return tokenizer(list(captions), max_length=WINDOW, **kept).input_ids


def new_autoencoder(widths: tuple[int, ...], *, generator: Generator) -> AutoencoderKL:
    """Images [n, 3, 16, 16] to latents [n, 4, 8, 8] and back."""
    if len(widths) != 2:
        raise InputError(f"an autoencoder halves images once: give two widths, not {widths}")
    with torch.random.fork_rng(devices=[]):  # the first weights are replaced
        autoencoder = AutoencoderKL(
            sample_size=SIZE,
            latent_channels=LATENT_CHANNELS,
            block_out_channels=widths,  # type: ignore[arg-type]
            down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
            up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
            layers_per_block=1,
            norm_num_groups=GROUPS,
            mid_block_add_attention=False,
        )
    initialise(autoencoder, generator=generator)
    return autoencoder


def new_text_encoder(
    tokenizer: CLIPTokenizer, width: int, *, generator: Generator
) -> CLIPTextModel:
    """One layer of attention."""
    special: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        max_position_embeddings=WINDOW,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        encoder = CLIPTextModel(config)
    initialise(encoder, generator=generator)
    for layer in encoder.modules():
        if isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.5, generator=generator)
    return encoder


def new_unet(
    widths: tuple[int, ...], text_width: int, *, generator: Generator
) -> UNet2DConditionModel:
    """It attends to itself and to the words at the lower resolution only, which is fast."""
    if len(widths) != 2:
        raise InputError(f"the U-Net has two resolutions: give two widths, not {widths}")
    with torch.random.fork_rng(devices=[]):
        unet = UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            block_out_channels=widths,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=text_width,
            attention_head_dim=HEADS,  # in this class the number of heads
            norm_num_groups=GROUPS,
        )
    initialise(unet, generator=generator)
    nn.init.zeros_(unet.conv_out.weight)
    return unet


def new_scheduler() -> DDIMScheduler:
    """The levels of noise of DDPM (arXiv 2006.11239), for velocities; the first step is at the end.

    The signal left there is 0.006. Of 20 steps half are at signals below 0.3, where a colour is
    chosen; a cosine schedule has 4 there, and too large steps favour what is near the mean.
    `steps_offset` means nothing with such steps, but Stable Diffusion asks for 1.
    """
    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
    )


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces with every such pair made one."""
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
