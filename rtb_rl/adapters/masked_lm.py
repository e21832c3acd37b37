"""Masked language models as Denoisers of masked diffusion: BERT's kin, MDLM, LLaDA and SEDD.

    model = load_masked_lm("kuleshov-group/mdlm-no_flashattn-fp32-owt", tokenizer="gpt2",
                           trust_remote_code=True)
    diffusion = MaskedDiffusion(length, model.mask, IndependentReveals(schedule, length))
    prior = Infilling(model.denoiser(schedule))

The extra "language" is needed; a folder works without a network.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtb_rl.adapters.hub import (
    has_code,
    read_config,
    read_foreign,
    read_native,
    read_tokenizer,
    read_weights,
    reading,
)
from rtb_rl.adapters.sedd import LARGEST_SIGMA, AtLevel, Sedd, is_sedd_config, sedd_settings
from rtb_rl.core import MaskingSchedule, TokenLogits
from rtb_rl.core.protocols import Condition, Denoiser
from rtb_rl.errors import InputError

WINDOWS = ("max_position_embeddings", "model_length", "max_sequence_length")
UNKNOWN_LENGTH = 1e30  # what tokenizers say that have no limit


@dataclass(frozen=True)
class MaskedLM:
    """A network that predicts masked tokens, and what a diffusion needs to know of it.

    `network(tokens [batch, length], sigma [batch] or None)` returns logits [batch, length,
    vocabulary], or log scores. `pad`: the id of a token that fills up rows and is not attended to,
    None where there is none. `window`: the longest sequence, None where nothing says. `never`: ids
    that the tokenizer doesn't have, rows that fill up an embedding. `largest_sigma`: the most noise
    that the network was told of in training; None for one that isn't told the time.
    """

    network: nn.Module
    tokenizer: Any
    mask: int
    pad: int | None
    window: int | None
    vocabulary: int
    never: tuple[int, ...] = ()
    largest_sigma: float | None = None

    def denoiser(self, schedule: MaskingSchedule | None = None) -> nn.Module:
        """The network as a Denoiser, log-probabilities [batch, length, vocabulary].

        The mask, and ids that the tokenizer doesn't have, get none. Every denoiser of this object
        shares its network. Raises InputError without a `schedule` for a network that is told the
        time; others ignore it.
        """
        if self.largest_sigma is None:
            network: Denoiser = _WithoutTime(self.network)
        elif schedule is None:
            raise InputError(
                "this network is told how much is masked, which takes a schedule to know; call"
                " denoiser(linear_masking(levels)), or give the schedule of the reveals"
            )
        else:
            network = AtLevel(self.network, schedule, self.largest_sigma)
        return TokenLogits(network, self.mask, never=self.never)


def load_masked_lm(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    mask: int | None = None,
    trust_remote_code: bool = False,
) -> MaskedLM:
    """The model in a folder, or on the hub under an id; float32, on the CPU, without dropout.

    `tokenizer`: a folder or an id where the source has none (MDLM and SEDD: "gpt2"). `mask`: the
    id, where neither config nor tokenizer names one. Its logits at a position must be about that
    position. Code that comes with a model runs only with `trust_remote_code`. Raises InputError
    where there is no such model, no mask token, weights are missing, or code isn't trusted.
    """
    source = str(source)
    config = read_config(source)
    foreign = has_code(config)
    if foreign and not trust_remote_code:
        raise InputError(
            f"{source!r} comes with code of its own ({', '.join(config['auto_map'].values())});"
            " read it, and if you trust it give trust_remote_code=True; nothing of it has run"
        )
    words = read_tokenizer(source, tokenizer, trust_remote_code)
    with reading("masked language model", source), torch.random.fork_rng(devices=[]):
        if is_sedd_config(config):
            return _sedd(source, config, words, mask)
        model = read_foreign(source, config) if foreign else read_native(source)
        return masked_lm(model, words, mask=mask)


def masked_lm(model: nn.Module, tokenizer: Any = None, *, mask: int | None = None) -> MaskedLM:
    """A transformers model at hand, with its tokenizer; put into evaluation mode and float32.

    Raises InputError where it has no logits, no mask token, or fewer tokens than the tokenizer.
    """
    config: Any = model.config
    one = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    with torch.no_grad():
        width = HubNetwork(model.float(), None)(one, None).shape[-1]
    last = config.vocab_size - 1 if config.model_type == "mdlm" else None  # it has no name there
    published = getattr(config, "mask_token_id", None), getattr(tokenizer, "mask_token_id", None)
    mask = _checked_mask((mask, *published, last), width)
    network = HubNetwork(model, _pad(config if tokenizer is None else tokenizer, mask))
    told = network.timed and getattr(config, "time_conditioning", False)
    return MaskedLM(
        network,
        tokenizer,
        mask,
        network.pad,
        _window(tokenizer, *(getattr(config, name, None) for name in WINDOWS)),
        width,
        _unknown(tokenizer, width, mask),
        LARGEST_SIGMA if told else None,
    )


class HubNetwork(nn.Module):
    """A transformers model as (tokens, sigma [batch] or None) -> logits [batch, length, V].

    Positions of token `pad` are not attended to, where the model can be told. A model that takes
    `timesteps` is given sigma, or zeros: what MDLM without time conditioning uses.
    """

    def __init__(self, model: nn.Module, pad: int | None):
        super().__init__()
        inputs = inspect.signature(model.forward).parameters
        self.model = model.eval()
        self.pad = pad if "attention_mask" in inputs else None
        self.timed = "timesteps" in inputs
        self.options = {"return_dict": True} if "return_dict" in inputs else {}

    def forward(self, tokens: Tensor, sigma: Tensor | None) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": tokens, **self.options}
        if self.pad is not None:
            inputs["attention_mask"] = (tokens != self.pad).long()
        if self.timed:
            zeros = torch.zeros(len(tokens), device=tokens.device)
            inputs["timesteps"] = zeros if sigma is None else sigma.float()
        output = self.model(**inputs)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None:
            raise InputError(
                f"{type(self.model).__name__} returns no logits over tokens; give a masked language"
                " model, whose class usually ends in ForMaskedLM"
            )
        return logits


class _WithoutTime(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        return self.network(x, None)


def _sedd(source: str, config: dict[str, Any], tokenizer: Any, mask: int | None) -> MaskedLM:
    settings = sedd_settings(config)
    with torch.device("meta"):
        network = Sedd(settings)
    weights = {name: value.float() for name, value in read_weights(source).items()}
    network.load_state_dict(weights, assign=True)
    width, mask = settings.tokens + 1, _checked_mask((mask, settings.mask), settings.tokens + 1)
    return MaskedLM(
        network.eval(),
        tokenizer,
        mask,
        None,
        _window(tokenizer, settings.length),
        width,
        _unknown(tokenizer, width, mask),
        settings.largest_sigma,
    )


def _checked_mask(candidates: tuple[int | None, ...], width: int) -> int:
    mask = next((each for each in candidates if each is not None), None)
    if mask is None:
        raise InputError(
            "a checkpoint without mask token: neither its config (mask_token_id) nor its tokenizer"
            " names one; give its id as mask=, or a model trained to fill in masks"
        )
    if not 0 <= mask < width:
        raise InputError(
            f"the mask token {mask} is none of the {width} tokens of the network; give its id as"
            " mask=, or the tokenizer that the network was trained with"
        )
    return mask


def _pad(named_by: Any, mask: int) -> int | None:
    """A pad token that is also the end of a text (GPT-2, LLaDA) has a meaning; it is no padding."""
    pad = getattr(named_by, "pad_token_id", None)
    others = {getattr(named_by, f"{name}_token_id", None) for name in ("bos", "eos", "sep")}
    return None if pad in others | {mask} else pad


def _window(tokenizer: Any, *lengths: int | None) -> int | None:
    named = (*lengths, getattr(tokenizer, "model_max_length", None))
    return min((each for each in named if each and each < UNKNOWN_LENGTH), default=None)


def _unknown(tokenizer: Any, width: int, mask: int) -> tuple[int, ...]:
    if tokenizer is None:
        return ()
    ids = set(tokenizer.get_vocab().values())
    if max(ids) >= width:
        raise InputError(
            f"the tokenizer has ids up to {max(ids)}, the network {width} tokens; give the"
            " tokenizer that the network was trained with"
        )
    return tuple(sorted(set(range(width)) - ids - {mask}))
