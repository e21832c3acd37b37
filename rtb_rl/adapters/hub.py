"""What the folder of a language model holds, or its repository on the hub: config, tokenizer,
weights, and perhaps code.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rtb_rl.adapters.extras import extra, without_progress
from rtb_rl.errors import InputError

with extra("language"):
    from transformers import (
        CONFIG_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForMaskedLM,
        AutoTokenizer,
    )
    from transformers.utils.hub import cached_file

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
LONGEST_REASON = 200  # characters: transformers lists every class that it has
SHIFTED = ("Dream",)  # model types whose logits at a position are about the next one


def read_config(source: str) -> dict[str, Any]:
    """config.json as it is; nothing else is fetched and nothing runs."""
    with reading("masked language model", source):
        path = cached_file(source, "config.json")
        if path is None:
            raise FileNotFoundError("there is no config.json")
        return json.loads(Path(path).read_text(encoding="utf-8"))


def has_code(config: Mapping[str, Any]) -> bool:
    """Whether the model runs code that comes with it, instead of transformers' own."""
    return "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING


def read_tokenizer(source: str, named: str | Path | None, trusted: bool) -> Any:
    """None where the source has none: transformers would make up one without words."""
    where = source if named is None else str(named)
    if not any(_file(where, name) for name in TOKENIZERS):
        if named is None:
            return None
        raise InputError(
            f"there is no tokenizer in {where!r}: give a folder with a tokenizer.json, or an id on"
            " the hub and a network connection"
        )
    with reading("tokenizer", where):
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trusted)


def read_weights(source: str) -> dict[str, Tensor]:
    """The tensors of one file or of several; a .bin is read without running what it pickles."""
    for name in WEIGHTS:
        index = _file(source, f"{name}.index.json")
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index else {name}
        files = [file for shard in sorted(shards) if (file := _file(source, shard))]
        if len(files) == len(shards):
            return {key: value for file in files for key, value in _tensors(file).items()}
    raise InputError(f"{source!r} has no weights: none of {', '.join(WEIGHTS)}, nor shards of one")


def read_native(source: str) -> nn.Module:
    """A masked language model of a class that transformers has."""
    model, report = AutoModelForMaskedLM.from_pretrained(
        source, output_loading_info=True, trust_remote_code=False
    )
    return _complete(model, report["missing_keys"])


def read_foreign(source: str, config: Mapping[str, Any]) -> nn.Module:
    """A model with code of its own, which runs; built and filled by hand.

    from_pretrained of transformers 5 fails on models that were written for 4 and leave out
    post_init, as MDLM and LLaDA do.
    """
    if config.get("model_type") in SHIFTED:
        raise InputError(
            f"the logits of {config['model_type']} at a position are about the next token; give a"
            " model that predicts the token at the position itself"
        )
    auto = AutoModelForMaskedLM if "AutoModelForMaskedLM" in config["auto_map"] else AutoModel
    settings = AutoConfig.from_pretrained(source, trust_remote_code=True)
    model = auto.from_config(settings, trust_remote_code=True).float()
    return _complete(model, model.load_state_dict(read_weights(source), strict=False).missing_keys)


def _complete(model: nn.Module, missing: Collection[str]) -> nn.Module:
    lacking = sorted(name for name, _ in model.named_parameters() if name in missing)
    if lacking:
        raise InputError(
            f"the checkpoint lacks {len(lacking)} weights of {type(model).__name__}"
            f" ({', '.join(lacking[:3])}, ...), which would be random; give one that was trained"
            " with its masked language head"
        )
    return model


def _tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _file(source: str, name: str) -> Path | None:
    try:
        path = cached_file(source, name)
    except OSError:
        return None
    return None if path is None else Path(path)


@contextmanager
def reading(what: str, source: str) -> Iterator[None]:
    """Turn whatever is raised inside into one InputError; no bars for what is loaded."""
    try:
        with without_progress():
            yield
    except InputError:
        raise
    except Exception as error:  # code that comes with a model may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]
        raise InputError(
            f"no {what} can be read from {source!r}: give a folder that save_pretrained wrote, or"
            f" an id on the hub and a network connection ({reason})"
        ) from error
