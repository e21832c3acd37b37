"""Networks of logits and of whole sequences as denoisers of masked diffusion."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rtb_rl.core import conditions
from rtb_rl.core.log_probs import check_log_probs
from rtb_rl.core.on_demand import log_probs_at
from rtb_rl.core.protocols import Condition, Denoiser


class TokenLogits(nn.Module):
    """A network that returns logits [batch, length, V], seen as a Denoiser of masked diffusion.

    The mask gets no probability (where it is among the V tokens), nor do the tokens of `never`; the
    rest is normalised, in float32 or better.
    """

    def __init__(self, network: Denoiser, mask: int, *, never: Sequence[int] = ()):
        super().__init__()
        self.network, self.mask, self.never = network, mask, tuple(never)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        return self._normalised(self.network(x, level, condition))

    def at(self, x: Tensor, level: Tensor, condition: Condition, row: Tensor, place: Tensor):
        """The same at the places (row, place): [n, V]."""
        return self._normalised(log_probs_at(self.network, x, level, condition, row, place))

    def _normalised(self, logits: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        barred = [i for i in {self.mask, *self.never} if i < logits.shape[-1]]
        index = torch.tensor(barred, dtype=torch.int64, device=logits.device)
        return logits.index_fill(-1, index, -torch.inf).log_softmax(-1)


class Infilling(nn.Module):
    """A Denoiser of the free tokens of a sequence; the rest of it is context and never enters x.

    Context is therefore never masked and never counted. The condition is a dict with at least

        tokens  int64 [batch, sequence], anything at the free positions
        free    int64 [batch, length], their places in the sequence, -1 for an unused slot

    so that rows may have different free positions, and fewer than `length`. The network sees the
    sequence with x written into it, and the whole condition; it returns log-probabilities
    [batch, sequence, V]. An unused slot is token 0 with certainty (also in x0 made from data), so
    it adds nothing to any log-ratio.
    """

    def __init__(self, network: Denoiser):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        tokens, free = _context(condition, x)
        log_probs = self.network(_written(tokens, free, x), level, condition)
        check_log_probs(log_probs, tokens)
        rows = torch.arange(len(x), device=x.device).unsqueeze(1)
        inside = log_probs[rows, free.clamp(min=0)]
        return torch.where((free >= 0).unsqueeze(-1), inside, _certain(log_probs))

    def at(self, x: Tensor, level: Tensor, condition: Condition, row: Tensor, place: Tensor):
        """The same at the slots (row, place): [n, V]; rows with unused ones alone are left out."""
        tokens, free = _context(condition, x)
        where = free[row, place]
        used = where >= 0
        if not bool(used.any()):
            return torch.zeros((len(row), 1), device=x.device)
        needed, inner = row[used].unique(return_inverse=True)
        sequence = _written(tokens[needed], free[needed], x[needed])
        given = conditions.take(condition, needed)
        inside = log_probs_at(self.network, sequence, level[needed], given, inner, where[used])
        answer = _certain(inside).repeat(len(row), 1)
        return answer.index_put((used.nonzero().squeeze(1),), inside)


def _context(condition: Condition, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence and the places of the slots; ValueError where they are missing or don't fit."""
    if not isinstance(condition, dict) or not {"tokens", "free"} <= condition.keys():
        given = sorted(condition) if isinstance(condition, dict) else type(condition).__name__
        raise ValueError(f"infilling needs a condition with 'tokens' and 'free', not {given}")
    tokens, free = condition["tokens"], condition["free"]
    if free.shape != x.shape:
        raise ValueError(
            f"'free' has shape {list(free.shape)}, x {list(x.shape)}: give each slot of x its"
            " place in the sequence, -1 where it is unused"
        )
    return tokens, free


def _written(tokens: Tensor, free: Tensor, x: Tensor) -> Tensor:
    """The sequence with x at its places."""
    end = tokens.shape[1]
    place = torch.where(free >= 0, free, end)  # unused slots are written beyond the end
    return torch.cat([tokens, torch.zeros_like(tokens[:, :1])], 1).scatter(1, place, x)[:, :end]


def _certain(like: Tensor) -> Tensor:
    """Token 0 with certainty: [V]."""
    certain = torch.full_like(like.detach().flatten(0, -2)[0], -torch.inf)
    certain[0] = 0
    return certain
