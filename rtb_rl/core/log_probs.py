"""What log-probabilities of tokens must be, wherever a denoiser returns them."""

import torch
from torch import Tensor

TOLERANCE = 1e-2
"""Of the log of a sum of probabilities, nats; wider where the dtype itself rounds more."""


def check_log_probs(log_probs: Tensor, x: Tensor) -> None:
    """ValueError unless these are floats [batch, length, V] for tokens [batch, length]."""
    if log_probs.ndim != 3 or log_probs.shape[:2] != x.shape or not log_probs.is_floating_point():
        raise ValueError(
            f"log-probabilities {log_probs.dtype} {list(log_probs.shape)} don't fit tokens"
            f" {list(x.shape)}: a denoiser returns floats [batch, length, vocabulary] for every"
            " position it is given; wrap one of longer sequences in Infilling"
        )


def check_masked_position(log_probs: Tensor, x: Tensor, mask: int) -> None:
    """`check_normalised` at the first masked position of the first row, if it has one.

    One position: this is looked at in every step, and a network of logits is one everywhere.
    """
    if len(x) and len(places := (x[0] == mask).nonzero()):
        check_normalised(log_probs.detach()[0, places[0, 0]])


def check_normalised(log_probs: Tensor) -> None:
    """ValueError unless these [V] are the logs of probabilities that sum to 1.

    Logits are drawn from as if they were normalised and scored as they are: draws and their
    probabilities would not belong together. NaN is left to what draws or scores it.
    """
    total = float(log_probs.logsumexp(-1))
    if abs(total) > max(TOLERANCE, 8 * torch.finfo(log_probs.dtype).eps):
        raise ValueError(
            f"log-probabilities of the tokens at a position sum to exp({total:.3g}), not to 1;"
            " wrap a network of logits in TokenLogits, or take log_softmax"
        )
