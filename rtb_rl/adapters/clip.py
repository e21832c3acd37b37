"""CLIP of transformers as two functions with gradients: images and texts -> unit vectors.

Images are prepared in torch, so that gradients reach them.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, pad

from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.hub import read_tokenizer, reading
from rtb_rl.errors import InputError

with extra("text-to-image"):
    from transformers import CLIPConfig, CLIPModel
    from transformers.utils.hub import cached_file

# of a channel over the images that CLIP was trained on: arXiv 2103.00020, and its code
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
BATCH = 32  # images or texts at a time

Frame = Callable[[Tensor, int], Tensor]


def crop_square(images: Tensor, side: int) -> Tensor:
    """Images with their shorter side at `side` pixels and the middle cut out: [n, 3, side, side].

    Bicubic with antialiasing, as PIL's, without PIL's rounding to bytes.
    """
    height, width = images.shape[-2:]
    shorter, longer = min(height, width), max(height, width)
    other = side * longer // shorter
    images = _resized(images, (side, other) if height <= width else (other, side))
    top, left = ((length - side) // 2 for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def pad_square(images: Tensor, side: int) -> Tensor:
    """Images with their longer side at `side` pixels, and black beside the shorter."""
    longer = max(images.shape[-2:])
    height, width = (max(1, round(side * length / longer)) for length in images.shape[-2:])
    images = _resized(images, (height, width))
    left, top = (side - width) // 2, (side - height) // 2
    return pad(images, (left, side - width - left, top, side - height - top))


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Width first, then height; as in PIL, each cuts off what its bicubic curve overshoots."""
    for shape in ((images.shape[-2], size[1]), size):
        if tuple(images.shape[-2:]) != shape:
            images = interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
    return images


@dataclass(frozen=True)
class Preparation:
    """Images [n, 3, height, width] in [0, 1] -> what the network sees, [n, 3, side, side]."""

    side: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    frame: Frame = crop_square

    def __call__(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise InputError(
                f"images are {images.dtype} {tuple(images.shape)}; CLIP needs float values in"
                " [0, 1], [n, 3, height, width]"
            )
        square = self.frame(images.float(), self.side)
        mean, std = (square.new_tensor(one)[:, None, None] for one in (self.mean, self.std))
        return (square - mean) / std


class Clip(nn.Module):
    """A frozen CLIP with its tokenizer and its preparation of images.

    It goes to the device of the images that it is given, and computes in the dtype of its weights,
    so `.to(torch.bfloat16)` halves its memory. Unit vectors are float32.
    """

    def __init__(self, model: CLIPModel, tokenizer: Any, preparation: Preparation, batch: int):
        super().__init__()
        if batch < 1:
            raise InputError(f"a batch of {batch} images; give at least 1")
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.preparation = preparation
        self.batch = batch
        config: Any = model.config
        longest = config.text_config.max_position_embeddings
        self.window = min(longest, getattr(tokenizer, "model_max_length", longest))

    @property
    def scale(self) -> Tensor:
        """The factor of the cosine that was learned."""
        return self.model.logit_scale.float().exp()

    def images(self, images: Tensor) -> Tensor:
        """Unit vectors of images in [0, 1], [n, d]; gradients reach the images."""
        self.to(images.device)
        return torch.cat([self._image_vectors(some) for some in images.split(self.batch)])

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts, [n, d]; equal ones are encoded once.

        A text that is longer than the encoder's window is cut, with a warning.
        """
        if self.tokenizer is None:
            raise InputError("this CLIP has no tokenizer; give the folder or id of one")
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        unique = list(places)
        for text in unique:
            self._warn_if_cut(text)
        starts = range(0, len(unique), self.batch)
        vectors = [self._text_vectors(unique[start : start + self.batch]) for start in starts]
        return torch.cat(vectors)[[places[text] for text in texts]]

    def _image_vectors(self, images: Tensor) -> Tensor:
        pixels = self.preparation(images).to(self.model.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def _text_vectors(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.window, return_tensors="pt"
        ).to(self.model.device)
        pooled = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return normalize(self.model.text_projection(pooled).float(), dim=-1)

    def _warn_if_cut(self, text: str) -> None:
        tokens = self.tokenizer(text, verbose=False)["input_ids"]
        if len(tokens) > self.window:
            # what is kept ends with the sign of the end, and so does the whole
            cut = self.tokenizer.decode(tokens[self.window - 1 : -1])
            warnings.warn(
                f"a prompt of {len(tokens)} tokens is longer than the {self.window} that CLIP"
                f" reads; this part of it doesn't count: {cut!r}",
                stacklevel=2,
            )


def load_clip(
    source: str | Path, *, processor: str | Path | None = None, batch: int = BATCH
) -> Clip:
    """The CLIP in a folder, or on the hub under an id, frozen and in float32.

    `processor`: where its tokenizer is, and perhaps a preprocessor_config.json with other means
    and deviations of channels; None: beside the model. InputError where there is no CLIP.
    """
    with reading("CLIP model", str(source)), torch.random.fork_rng(devices=[]):
        loaded = CLIPModel.from_pretrained(str(source), output_loading_info=True)
    return _clip(loaded, str(source), str(processor or source), batch, crop_square)


def clip_from_weights(
    weights: Mapping[str, Tensor],
    source: str | Path,
    *,
    processor: str | Path,
    batch: int = BATCH,
    frame: Frame = crop_square,
) -> Clip:
    """A CLIP of the sizes that `processor` says with `weights`, which were read from `source`."""
    with reading("CLIP configuration", str(processor)):
        config = CLIPConfig.from_pretrained(str(processor))
    with reading("CLIP model", str(source)), torch.random.fork_rng(devices=[]):
        loaded = CLIPModel.from_pretrained(
            None, config=config, state_dict=dict(weights), output_loading_info=True
        )
    return _clip(loaded, str(source), str(processor), batch, frame)


def _clip(loaded: Any, source: str, processor: str, batch: int, frame: Frame) -> Clip:
    model, report = loaded
    if lacking := sorted(report["missing_keys"]):
        raise InputError(
            f"{source!r} lacks {len(lacking)} weights of a CLIP ({', '.join(lacking[:3])}, ...),"
            " which would be random; give a checkpoint of a CLIP with both encoders"
        )
    mean, std = _channels(processor)
    side = model.config.vision_config.image_size
    tokenizer = read_tokenizer(processor, None, False)
    return Clip(model.float(), tokenizer, Preparation(side, mean, std, frame), batch)


def _channels(source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the channels, as the source says or else CLIP's own."""
    try:
        path = cached_file(source, "preprocessor_config.json")
    except OSError:
        path = None
    settings = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    return tuple(settings.get("image_mean", MEAN)), tuple(settings.get("image_std", STD))
