"""Masked (absorbing) diffusion on sequences of tokens."""

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core.kernels import UnmaskingKernel, token_log_probs
from rtb_rl.core.log_probs import check_log_probs, check_masked_position
from rtb_rl.core.on_demand import OnDemandLogProbs
from rtb_rl.core.reveals import RevealLaw

LogProbs = Tensor | OnDemandLogProbs
"""Log-probabilities [batch, length, V] of the clean tokens."""


class RevealPrediction(NamedTuple):
    """Log-probabilities [batch, length, V], and what to add to the log-odds that a position is
    revealed, [batch, length].

    What a denoiser returns that learns when to reveal. The exact posterior of several tokens a step
    prefers to reveal some positions early; where the prior's predictions contradict each other, a
    shared schedule leaves an error that more levels don't remove.
    """

    log_probs: Tensor
    reveal_shift: Tensor


class MaskedDiffusion(nn.Module):
    """Tokens that are masked one by one until all are, and revealed again by the denoiser.

    `mask` is the id of the absorbing token; it may be V, one beyond the tokens that a denoiser
    gives probability to. A denoiser returns log-probabilities [batch, length, V] of the clean token
    at every position, of which those at masked positions count, or a RevealPrediction; ValueError
    for logits. `reveals` says which positions each step reveals; noising is the same chain
    backwards. x is int64 [batch, length]. Without parameters. arXiv 2406.07524 (MDLM), 2310.16834
    (SEDD).
    """

    signal_left = 0.0

    def __init__(self, length: int, mask: int, reveals: RevealLaw):
        super().__init__()
        if reveals.length != length:
            raise ValueError(
                f"reveals are for {reveals.length} positions, the diffusion has {length}; build"
                " both with one length"
            )
        self.length, self.mask, self.reveals = length, mask, reveals
        self.event_shape = (length,)
        self.levels = reveals.levels

    def start(self, batch: int, *, generator: Generator) -> Tensor:
        """x[K], all mask: int64 [batch, length], on the generator's device."""
        shape = (batch, self.length)
        return torch.full(shape, self.mask, dtype=torch.int64, device=generator.device)

    def kernel(
        self, prediction: LogProbs | RevealPrediction, x: Tensor, level: Tensor
    ) -> UnmaskingKernel:
        """The law of x[level - 1] given x and the predicted tokens; `level` [batch] in 1..K."""
        log_probs, shift = _parts(prediction)
        self._check(x)
        self._check_prediction(log_probs, shift, x)
        return UnmaskingKernel(log_probs, x, level, self.mask, self.reveals, shift)

    def corrupt(self, x0: Tensor, level: Tensor, *, generator: Generator) -> Tensor:
        """x[level] given x[0]; one level a row, 0..K. ValueError for a masked x[0]."""
        return self._masked_until(self._times(x0, generator), x0, level.unsqueeze(1))

    def noise_path(self, x0: Tensor, *, generator: Generator) -> Tensor:
        """x[0..K] given x[0]: [K + 1, batch, length]. ValueError for a masked x[0].

        Every path that can end in x[0], with the probability that the reveals alone give it.
        """
        levels = torch.arange(self.levels + 1, device=x0.device).reshape(-1, 1, 1)
        return self._masked_until(self._times(x0, generator), x0, levels)

    def denoising_loss(
        self, prediction: LogProbs | RevealPrediction, x0: Tensor, x: Tensor, level: Tensor
    ) -> Tensor:
        """K sum_i P(i is revealed in this step) (-log p(x0_i)) / length, nats: [batch].

        Its mean over levels drawn uniformly and x = corrupt(x0) is the negative evidence lower
        bound a token. Of a RevealPrediction only the tokens count: noising is the chain without a
        shift, so that zero is the best shift of a prior.
        """
        log_probs, shift = _parts(prediction)
        self._check(x0)
        self._check(x)
        self._check_prediction(log_probs, shift, x)
        probability = self.reveals.probability(x == self.mask, level)
        surprise = -token_log_probs(log_probs, x0, probability > 0)
        each = probability.to(surprise.dtype) * surprise
        return each.sum(1) * (self.levels / self.length)

    def _times(self, x0: Tensor, generator: Generator) -> Tensor:
        self._check(x0)
        if bool((x0 == self.mask).any()):
            raise ValueError(
                f"clean data holds token {self.mask}, the mask, {int((x0 == self.mask).sum())}"
                " times; a mask is no data: give it an id of its own, or drop those rows"
            )
        return self.reveals.times(len(x0), generator=generator)

    def _masked_until(self, times: Tensor, x0: Tensor, level: Tensor) -> Tensor:
        return torch.where(times <= level, self.mask, x0)

    def _check(self, x: Tensor) -> None:
        if x.dtype != torch.int64 or x.ndim != 2 or x.shape[1] != self.length:
            raise ValueError(
                f"tokens must be int64 [batch, {self.length}], not {x.dtype} {list(x.shape)};"
                " convert ids with .long(), and build the diffusion for the length of the data"
            )

    def _check_prediction(self, log_probs: LogProbs, shift: Tensor | None, x: Tensor) -> None:
        if isinstance(log_probs, Tensor):
            check_log_probs(log_probs, x)
            check_masked_position(log_probs, x, self.mask)
        if shift is not None and shift.shape != x.shape:
            raise ValueError(
                f"a reveal shift {list(shift.shape)} doesn't fit tokens {list(x.shape)}: give one"
                " number a position"
            )


def _parts(prediction: LogProbs | RevealPrediction) -> tuple[LogProbs, Tensor | None]:
    return prediction if isinstance(prediction, RevealPrediction) else (prediction, None)
