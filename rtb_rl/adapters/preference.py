"""What people would prefer, as log rewards of images and prompts: models on top of CLIP.

Each is called as `reward(images, prompts, metadata) -> log r [n]`, nats, before the inverse
temperature, with images [n, 3, height, width] in [0, 1]. All are frozen and let gradients reach the
images. A model is read when its function is called, from a folder or from the hub.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rtb_rl.adapters.clip import BATCH, Clip, clip_from_weights, load_clip, pad_square
from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.hub import reading
from rtb_rl.adapters.open_clip import from_open_clip
from rtb_rl.errors import InputError

with extra("text-to-image"):
    from transformers.utils.hub import cached_file

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class ClipScore(nn.Module):
    """log r = scale cos(image, prompt).

    With the scale that the model learned (None) this is its logit. For a model of preferences, such
    as PickScore or HPS, the difference of two images is then the log-odds that the first is
    preferred.
    """

    differentiable = True

    def __init__(self, clip: Clip, scale: float | None = None):
        super().__init__()
        self.clip = clip
        self.scale = scale

    def forward(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()
    ) -> Tensor:
        if len(prompts) != len(images):
            raise InputError(
                f"{len(images)} images came with {len(prompts)} prompts; give one an image"
            )
        pictures = self.clip.images(images)
        cosines = (pictures * self.clip.texts(prompts)).sum(-1)
        return (self.clip.scale if self.scale is None else self.scale) * cosines


class AestheticScore(nn.Module):
    """log r = head(image), the mark from about 1 to 10 that people would give; prompts are ignored.

    `head`: of unit vectors [n, d] to [n, 1].
    """

    differentiable = True

    def __init__(self, clip: Clip, head: nn.Module):
        super().__init__()
        self.clip = clip
        self.head = head.requires_grad_(False).eval()

    def forward(
        self, images: Tensor, prompts: Sequence[str] = (), metadata: Sequence[Any] = ()
    ) -> Tensor:
        self.to(images.device)
        weight = next(self.head.parameters())
        return self.head(self.clip.images(images).to(weight.dtype)).squeeze(-1).float()


def clip_score(
    source: str | Path = CLIP_L,
    *,
    processor: str | Path | None = None,
    scale: float | None = None,
    batch: int = BATCH,
) -> ClipScore:
    """How well an image fits its prompt, by a CLIP: scale times the cosine (arXiv 2104.08718).

    `scale`: None for the learned one, which is about 100. `processor` as in `load_clip`.
    """
    return ClipScore(load_clip(source, processor=processor, batch=batch), scale)


def pick_score(
    source: str | Path = "yuvalkirstain/PickScore_v1",
    *,
    processor: str | Path = CLIP_H,
    scale: float | None = None,
    batch: int = BATCH,
) -> ClipScore:
    """PickScore (arXiv 2305.01569), about 15 to 25; differences are log-odds of preference."""
    return ClipScore(load_clip(source, processor=processor, batch=batch), scale)


def hps(
    source: str | Path = "xswu/HPSv2",
    *,
    file: str = "HPS_v2.1_compressed.pt",
    processor: str | Path = CLIP_H,
    scale: float | None = None,
    batch: int = BATCH,
) -> ClipScore:
    """The Human Preference Score, version 2.1 (arXiv 2306.09341).

    The score that is published is the cosine, `scale` 1: about 0.2 to 0.35. With None it is times
    the learned scale of about 100, and differences are log-odds of preference. `source`: a file,
    or the folder or id with `file`; `processor`: a CLIP of the same sizes for transformers, of
    which the configuration and the tokenizer are read. Images keep their proportions and get black
    bars.
    """
    weights = from_open_clip(_read(source, file))
    clip = clip_from_weights(weights, source, processor=processor, batch=batch, frame=pad_square)
    return ClipScore(clip, scale)


def laion_aesthetic(
    source: str | Path = CLIP_L,
    *,
    head: str | Path = "trl-lib/ddpo-aesthetic-predictor",
    file: str = "aesthetic-model.pth",
    processor: str | Path | None = None,
    batch: int = BATCH,
) -> AestheticScore:
    """LAION's aesthetic predictor, version 2, as in DDPO (arXiv 2305.13301): a mark of 1 to 10.

    `head`: a file, or the folder or id with `file`; linear layers without anything between them,
    768-1024-128-64-16-1, or a single one. InputError where it doesn't fit the CLIP.
    """
    clip = load_clip(source, processor=processor, batch=batch)
    layers = linear_head(_read(head, file))
    width, found = clip.model.visual_projection.out_features, layers[0].in_features
    if width != found:
        raise InputError(
            f"the vectors of {str(source)!r} have {width} numbers, the head of {str(head)!r} reads"
            f" {found}; give the CLIP that it was trained with"
        )
    return AestheticScore(clip, nn.Sequential(*layers))


def clip_embedder(source: str | Path = CLIP_L, *, batch: int = BATCH) -> Callable[[Tensor], Tensor]:
    """images [n, 3, height, width] in [0, 1] -> unit vectors [n, d], as to compare images by."""
    return load_clip(source, batch=batch).images


def linear_head(weights: Mapping[str, Tensor]) -> list[nn.Linear]:
    """The linear layers that `weights` holds, in the order of their numbers, ending in one output.

    Names are "layers.N.weight" and "layers.N.bias", or "weight" and "bias" for one layer.
    InputError for anything else.
    """
    names = [name.removesuffix("weight") for name in weights if name.endswith("weight")]
    layers: list[nn.Linear] = []
    for name in sorted(names, key=_number):
        weight, bias = weights[f"{name}weight"], weights.get(f"{name}bias")
        before = layers[-1].out_features if layers else weight.shape[-1]
        if weight.ndim != 2 or weight.shape[1] != before or bias is None:
            raise InputError(
                f"{name}weight {tuple(weight.shape)} is no linear layer of {before} numbers with a"
                " bias; give the head of an aesthetic predictor"
            )
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        layer.load_state_dict({"weight": weight.float(), "bias": bias.float()}, assign=True)
        layers.append(layer)
    if not layers or layers[-1].out_features != 1:
        raise InputError(
            f"the head has {len(layers)} linear layers and doesn't end in one number; give the head"
            " of an aesthetic predictor"
        )
    return layers


def _number(name: str) -> int:
    digits = "".join(sign for sign in name if sign.isdigit())
    return int(digits or 0)


def _read(source: str | Path, file: str) -> dict[str, Tensor]:
    """The tensors of a file, or of `file` in a folder or on the hub, without running its pickle."""
    with reading("weights", f"{source}/{file}" if not Path(source).is_file() else str(source)):
        path = source if Path(source).is_file() else cached_file(str(source), file)
        if path is None:
            raise FileNotFoundError(f"there is no {file}")
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        return found.get("state_dict", found)
