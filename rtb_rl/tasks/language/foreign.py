"""Models from elsewhere as priors and rewards: masked and causal language models, classifiers."""

from torch import Tensor, nn
from torch.nn import functional

from rtb_rl.adapters.causal_lm import load_causal_lm
from rtb_rl.adapters.masked_lm import load_masked_lm
from rtb_rl.core import linear_masking
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.tasks.language.codec import HubCodec
from rtb_rl.tasks.language.denoiser import TextPrior
from rtb_rl.tasks.language.language_model import LanguageModel
from rtb_rl.tasks.language.prompts import Frame


class Cropped(nn.Module):
    """A denoiser of sequences, without the last columns that are padding in every row."""

    def __init__(self, network: nn.Module, pad: int):
        super().__init__()
        self.network, self.pad = network, pad

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        filled = (x != self.pad).any(0).nonzero()
        end = int(filled[-1]) + 1 if len(filled) else 1
        log_probs = self.network(x[:, :end], level, None)
        return functional.pad(log_probs, (0, 0, 0, x.shape[1] - end))


def foreign_prior(
    source: str,
    *,
    levels: int,
    slots: int,
    window: int,
    ends: bool = False,
    tokenizer: str | None = None,
    mask: int | None = None,
    trust_remote_code: bool = False,
) -> TextPrior:
    """A masked language model of a folder or of the hub, as a prior of gaps.

    InputError where it can't be loaded, has no tokenizer or mask, or reads fewer tokens than the
    window.
    """
    model = load_masked_lm(
        source, tokenizer=tokenizer, mask=mask, trust_remote_code=trust_remote_code
    )
    if model.tokenizer is None:
        raise InputError(f"{source!r} has no tokenizer; name one, such as gpt2 for MDLM and SEDD")
    if model.window is not None and model.window < window:
        raise InputError(
            f"{source!r} reads {model.window} tokens, and the window is {window}; make that smaller"
        )
    codec = HubCodec(model.tokenizer, mask=model.mask)
    network: nn.Module = model.denoiser(linear_masking(levels))
    if model.pad is not None:  # else what fills up is seen, and must not depend on other rows
        network = Cropped(network, codec.pad)
    recipe = {
        "source": source,
        "tokenizer": tokenizer,
        "mask": mask,
        "trust_remote_code": trust_remote_code,
    }
    return TextPrior(Frame(codec, slots, window, ends), network, levels, recipe)


def foreign_language_model(source: str, *, trust_remote_code: bool = False) -> LanguageModel:
    """A causal language model of a folder or of the hub, with its own tokenizer."""
    found = load_causal_lm(source, trust_remote_code=trust_remote_code)
    codec = HubCodec(found.tokenizer, mask=len(found.tokenizer))
    return LanguageModel(found.network, codec, found.window)
