"""Causal language models of transformers, as networks that give logits where they are asked."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.hub import has_code, read_config, read_tokenizer, reading
from rtb_rl.errors import InputError

with extra("language"):
    from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class CausalLM:
    """A network with its tokenizer; `window`: tokens that it can read, None where nothing says."""

    network: "CausalNetwork"
    tokenizer: Any
    window: int | None


class CausalNetwork(nn.Module):
    """Tokens [batch, length] -> logits of the token after each: [batch, length, V], float32.

    Padding must be at the end of a row, where no other token sees it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits.float()

    def at(self, tokens: Tensor, row: Tensor, place: Tensor) -> Tensor:
        """Logits of the token after the places (row, place): [n, V]."""
        return self(tokens)[row, place]


def load_causal_lm(
    source: str, *, tokenizer: str | None = None, trust_remote_code: bool = False
) -> CausalLM:
    """The causal model in a folder, or on the hub under an id, frozen and in float32.

    Raises InputError where there is no such model or tokenizer, and for code that isn't trusted.
    """
    if has_code(read_config(source)) and not trust_remote_code:
        raise InputError(
            f"{source!r} comes with code of its own; read it, and if you trust it give"
            " trust_remote_code; nothing of it has run"
        )
    words = read_tokenizer(source, tokenizer, trust_remote_code)
    if words is None:
        raise InputError(f"{source!r} has no tokenizer; give one")
    with reading("causal language model", source), torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=trust_remote_code)
    model = model.float().requires_grad_(False).eval()
    window = getattr(model.config, "max_position_embeddings", None)
    return CausalLM(CausalNetwork(model), words, window)
