"""Prompts of a text-to-image pipeline: encoded once, and how its U-Net is guided by them.

A condition is the number of a prompt, int64 [batch], 0..P - 1. Inside `Guided` it becomes a row of
the tables of EncodedPrompts, where row 0 is the negative prompt and row i + 1 prompt i.
"""

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from rtb_rl.adapters.extras import extra
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError

with extra("text-to-image"):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
        StableDiffusionXLPipeline,
    )

TextToImagePipeline = StableDiffusionPipeline | StableDiffusionXLPipeline
Size = int | tuple[int, int]

CHUNK = 16  # prompts through the text encoder at a time


class EncodedPrompts(nn.Module):
    """What a U-Net is told of each prompt; row 0 is the negative prompt, row i + 1 is texts[i].

    `embedding`: [P + 1, L, D]; of SDXL also `pooled`: [P + 1, E], and `time_ids`: [1, 6], the size
    and the crop in pixels, the same for all. None of it is part of a state_dict.
    """

    embedding: Tensor
    pooled: Tensor | None
    time_ids: Tensor | None

    def __init__(
        self,
        texts: Sequence[str],
        embedding: Tensor,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        *,
        negative: str = "",
    ):
        super().__init__()
        self.texts, self.negative = tuple(texts), negative
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("pooled", pooled, persistent=False)
        self.register_buffer("time_ids", time_ids, persistent=False)

    def forward(self, row: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments of the U-Net for these rows of the tables, int64 [batch]."""
        inputs: dict[str, Any] = {"encoder_hidden_states": self.embedding[row].to(dtype)}
        if self.pooled is not None and self.time_ids is not None:
            inputs["added_cond_kwargs"] = {
                "text_embeds": self.pooled[row].to(dtype),
                "time_ids": self.time_ids.expand(len(row), -1),
            }
        return inputs


class PromptedUNet(nn.Module):
    """The raw output of a text-to-image U-Net at a level: shaped as x, in the dtype of x.

    The condition is int64 [batch], a row of the tables of `prompts`. `timesteps` and `precision` as
    in UNetDenoiser; the network is put into evaluation mode.
    """

    timesteps: Tensor

    def __init__(
        self,
        unet: nn.Module,
        timesteps: Tensor,
        prompts: EncodedPrompts,
        *,
        precision: torch.dtype | None = None,
    ):
        super().__init__()
        self.unet = unet.eval()
        self.prompts = prompts
        self.precision = precision
        self.register_buffer("timesteps", timesteps, persistent=False)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        inputs = self.prompts(condition, x.dtype)
        with torch.autocast(x.device.type, self.precision, enabled=self.precision is not None):
            output = self.unet(x, self.timesteps[level], **inputs).sample
        return output.to(x.dtype)


class Guided(nn.Module):
    """Classifier-free guidance, u + scale (c - u): what a text-to-image pipeline samples from.

    u is the prediction for the negative prompt, c that for the prompt with the number `condition`,
    int64 [batch]; both come from one call on 2 * batch rows (arXiv 2207.12598 eq. 6). At scale 1
    that is c alone, and one call on batch rows. Guiding the predicted x0 is the same as guiding the
    network's output: at a given x each is an affine map of the other, a x + b output, and the
    weights 1 - scale and scale sum to one.
    """

    def __init__(self, denoiser: nn.Module, scale: float):
        super().__init__()
        self.denoiser, self.scale = denoiser, scale

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        if not isinstance(condition, Tensor):
            raise InputError(
                "a text-to-image denoiser needs the numbers of its prompts, int64 [batch], not"
                f" {type(condition).__name__}; for the first prompt give zeros"
            )
        row = condition + 1
        if self.scale == 1:
            return self.denoiser(x, level, row)
        rows = torch.cat([torch.zeros_like(row), row])
        both = self.denoiser(torch.cat([x, x]), torch.cat([level, level]), rows)
        without, given = both.chunk(2)
        return without + self.scale * (given - without)


@torch.no_grad()
def encode_prompts(
    pipeline: TextToImagePipeline,
    texts: Sequence[str],
    *,
    negative: str = "",
    size: Size | None = None,
) -> EncodedPrompts:
    """The prompts and the negative prompt through the pipeline's own `encode_prompt`.

    Without a negative prompt it is what the pipeline takes without one: the empty text, or zeros
    for SDXL with force_zeros_for_empty_prompt. `size`: pixels of the image, or (height, width), as
    SDXL is told it. Warns of each prompt that is longer than the text encoder's window, naming what
    is cut. Raises InputError for no prompts.
    """
    if isinstance(texts, str):
        raise InputError(f"give a list of prompts, [{texts!r}], not one text")
    if not texts:
        raise InputError("there are no prompts; give at least one")
    for text in dict.fromkeys([*texts, negative]):
        _warn_if_cut(pipeline, text)
    device, encode = pipeline.unet.device, cast(Any, pipeline.encode_prompt)
    shared = {"device": device, "num_images_per_prompt": 1}
    without = [negative] if negative else None
    guided = {"do_classifier_free_guidance": True, "negative_prompt": without}
    parts = [encode(list(texts[:1]), **shared, **guided)[1::2]]  # the halves for the negative one
    for begin in range(0, len(texts), CHUNK):
        chunk = list(texts[begin : begin + CHUNK])
        parts.append(encode(chunk, **shared, do_classifier_free_guidance=False)[::2])
    tables = [torch.cat(rows).to(device) for rows in zip(*parts)]
    time_ids = None
    if isinstance(pipeline, StableDiffusionXLPipeline):
        height, width = size_in_pixels(pipeline, size)
        numbers = [[height, width, 0, 0, height, width]]
        time_ids = torch.tensor(numbers, dtype=tables[0].dtype, device=device)
    return EncodedPrompts(texts, tables[0], *tables[1:], time_ids=time_ids, negative=negative)


def size_in_pixels(pipeline: TextToImagePipeline, size: Size | None) -> tuple[int, int]:
    """Height and width of the images; without `size` those that the U-Net was trained on.

    Raises InputError for a size that is not a whole number of latents.
    """
    factor = pipeline.vae_scale_factor
    if size is None:
        sample = pipeline.unet.config["sample_size"]
        if sample is None:
            raise InputError("this U-Net has no sample_size; give the size of the images in pixels")
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return height * factor, width * factor
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1 or height % factor or width % factor:
        raise InputError(
            f"images of {height} x {width} pixels don't fit this pipeline, one latent of which"
            f" stands for {factor} x {factor} pixels; give positive multiples of {factor}"
        )
    return height, width


def _warn_if_cut(pipeline: TextToImagePipeline, text: str) -> None:
    for tokenizer in (pipeline.tokenizer, getattr(pipeline, "tokenizer_2", None)):
        if tokenizer is None:
            continue
        ids = tokenizer(pipeline.maybe_convert_prompt(text, tokenizer)).input_ids
        window = tokenizer.model_max_length
        if len(ids) > window:
            cut = tokenizer.decode(ids[window - 1 : -1])
            warnings.warn(
                f"the prompt {text!r} has {len(ids)} tokens, more than the {window} that the text"
                f" encoder sees; what is cut off: {cut!r}",
                stacklevel=3,
            )
            return
