"""Predictions of tokens that are computed only where a step needs them.

A step of masked diffusion reveals few positions, in many rows none; the rest of what a network
would say there is never looked at. Which positions are revealed does not depend on the network, so
the network can wait to be asked.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rtb_rl.core import conditions
from rtb_rl.core.log_probs import check_normalised
from rtb_rl.core.protocols import Condition


class OnDemandLogProbs:
    """Log-probabilities [batch, length, V] that are computed at the positions asked for.

    `log_probs[chosen]`, bool [batch, length] -> [n, V] as of a tensor. Without gradient the last
    answer is kept: a path is drawn from and scored at the same positions. ValueError for logits.
    """

    def __init__(self, evaluate: Callable[[Tensor], Tensor]):
        self._evaluate = evaluate
        self._last: tuple[Tensor, Tensor] | None = None

    def __getitem__(self, chosen: Tensor) -> Tensor:
        if not bool(chosen.any()):
            return torch.zeros((0, 1), device=chosen.device)
        if torch.is_grad_enabled():
            return self._evaluated(chosen)
        if self._last is None or not torch.equal(self._last[0], chosen):
            self._last = chosen, self._evaluated(chosen)
        return self._last[1]

    def _evaluated(self, chosen: Tensor) -> Tensor:
        found = self._evaluate(chosen)
        check_normalised(found[0].detach())
        return found

    def tempered(self, factor: float) -> "OnDemandLogProbs":
        """At `factor` times the temperature."""
        return OnDemandLogProbs(lambda chosen: (self[chosen] / factor).log_softmax(-1))


class PositionDenoiser(Protocol):
    """A denoiser of tokens that can also be asked for some positions."""

    def at(self, x: Tensor, level: Tensor, condition: Any, row: Tensor, place: Tensor) -> Tensor:
        """Log-probabilities [n, V] at the places (row, place), int64 [n] each."""
        ...


class OnDemand(nn.Module):
    """A denoiser of tokens, evaluated for the rows that reveal something and at these positions.

    The same law as the denoiser's for the same generator, with a fraction of the work: of K steps
    for L tokens, a row needs K (1 - (1 - 1 / K)^L).
    """

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> OnDemandLogProbs:
        def evaluate(chosen: Tensor) -> Tensor:
            rows = chosen.any(1).nonzero().squeeze(1)
            row, place = chosen[rows].nonzero(as_tuple=True)
            given = conditions.take(condition, rows)
            return log_probs_at(self.denoiser, x[rows], level[rows], given, row, place)

        return OnDemandLogProbs(evaluate)


def log_probs_at(
    denoiser: Any, x: Tensor, level: Tensor, condition: Any, row: Tensor, place: Tensor
) -> Tensor:
    """What a denoiser [batch, length, V] says at the places (row, place): [n, V]; only that is
    computed where it has a method `at`.
    """
    if hasattr(denoiser, "at"):
        return denoiser.at(x, level, condition, row, place)
    return denoiser(x, level, condition)[row, place]
