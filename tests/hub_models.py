"""Tiny models of transformers in folders, with tokenizers trained on the spot."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer, WordLevelTrainer
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

SPECIAL = {name: f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


def word_tokenizer(texts: list[str], **special: str) -> PreTrainedTokenizerFast:
    """Lower-case words and signs, with the special tokens of BERT."""
    tokenizer = Tokenizer(WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = WordLevelTrainer(special_tokens=list(SPECIAL.values()), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    given = {f"{name}_token": sign for name, sign in SPECIAL.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**given, **special})


def byte_tokenizer(texts: list[str], vocabulary: int = 300) -> PreTrainedTokenizerFast:
    """Byte pairs and one special token, as GPT-2 has them."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def shaken(model: nn.Module, scale: float = 0.3) -> Any:
    """Every parameter from a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=scale, generator=generator)
    return model.eval()


def save_gpt2(folder: Path, texts: list[str], *, window: int = 128, extra_rows: int = 0) -> Path:
    """`extra_rows`: of the embedding, which no token has."""
    tokenizer = byte_tokenizer(texts)
    config = GPT2Config(
        vocab_size=len(tokenizer) + extra_rows,
        n_positions=window,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    shaken(GPT2LMHeadModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bert_config(tokenizer: PreTrainedTokenizerFast, window: int = 64, **given: Any) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=window,
        pad_token_id=tokenizer.pad_token_id,
        **given,
    )


def save_bert(folder: Path, texts: list[str], *, window: int = 64, **special: str) -> Path:
    """A masked language model."""
    tokenizer = word_tokenizer(texts, **special)
    shaken(BertForMaskedLM(bert_config(tokenizer, window))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def classifier(texts: list[str], labels: int = 3) -> tuple[Any, PreTrainedTokenizerFast]:
    tokenizer = word_tokenizer(texts)
    config = bert_config(tokenizer, num_labels=labels)
    return shaken(BertForSequenceClassification(config)), tokenizer
