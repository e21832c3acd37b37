"""Weights of open_clip under the names that transformers' CLIPModel has for them."""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from rtb_rl.errors import InputError

# open_clip -> transformers; "pre_layrnorm" is how it is written there
NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
UNNEEDED = {"attn_mask"}  # the causal mask, which transformers makes itself


def from_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as a state dict of CLIPModel.

    Queries, keys and values of a block are rows of one matrix there and three matrices here;
    projections are on the other side of their vectors. InputError for a name of neither.
    """
    return {name: value for one in weights.items() for name, value in _converted(*one)}


def _converted(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    block = BLOCK.fullmatch(name)
    if name in NAMES:
        yield NAMES[name], value
    elif name in TRANSPOSED:
        yield TRANSPOSED[name], value.T.contiguous()
    elif block and (block[3] in PARTS or block[3] == "attn.in_proj"):
        model = "vision_model" if block[1] else "text_model"
        stem = f"{model}.encoder.layers.{block[2]}"
        if block[3] in PARTS:
            yield f"{stem}.{PARTS[block[3]]}.{block[4]}", value
        else:
            for letter, rows in zip("qkv", value.chunk(3), strict=True):
                yield f"{stem}.self_attn.{letter}_proj.{block[4]}", rows.contiguous()
    elif name not in UNNEEDED:
        raise InputError(
            f"{name!r} {tuple(value.shape)} is no weight of a CLIP of open_clip with two"
            " transformers; give such a checkpoint"
        )
