"""A tiny CLIP of transformers in a folder, with a tokenizer of single letters."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

SIDE, WIDTH, WINDOW = 24, 8, 10
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tiny_tokenizer() -> CLIPTokenizer:
    """Letters and ends of words, as CLIP's byte pairs without a merge."""
    signs = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{one}</w>" for one in LETTERS)]
    vocabulary = {sign: number for number, sign in enumerate(signs)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=WINDOW)


def tiny_clip() -> CLIPModel:
    """Seeded weights, large enough that images and texts differ."""
    shared = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
    }
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {"vocab_size": 60, "max_position_embeddings": WINDOW, **ends}
    vision = {"image_size": SIDE, "patch_size": 8}
    config = CLIPConfig(
        text_config={**shared, **text}, vision_config={**shared, **vision}, projection_dim=WIDTH
    )
    model = CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
        model.logit_scale.fill_(3.0)
    return model


def save_clip(folder: Path) -> Path:
    """The model and the tokenizer in a folder."""
    tiny_clip().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
