"""A network of tokens as the denoiser of a gap: with the right context in view, and without."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rtb_rl.core import (
    IndependentReveals,
    Infilling,
    MaskedDiffusion,
    TokenLogits,
    linear_masking,
)
from rtb_rl.core.protocols import Condition
from rtb_rl.nn.transformer import GATE_SCALE, GatedTransformer, MaskedTransformer
from rtb_rl.tasks.language.prompts import Frame


class LeftContext(nn.Module):
    """A denoiser that is not shown the right context: the sequence ends with the gap."""

    def __init__(self, denoiser: Infilling, pad: int):
        super().__init__()
        self.denoiser, self.pad = denoiser, pad

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        return self.denoiser(x, level, self._shown(condition))

    def at(self, x: Tensor, level: Tensor, condition: Condition, row: Tensor, place: Tensor):
        """The same at the slots (row, place): [n, V]."""
        return self.denoiser.at(x, level, self._shown(condition), row, place)

    def _shown(self, condition: Any) -> dict[str, Tensor]:
        tokens = torch.where(condition["right"], self.pad, condition["tokens"])
        return {**condition, "tokens": tokens}


class GatedLogits(nn.Module):
    """Any network of sequences, to whose logits the right context fades in.

    left + gate * (both - left), where `left` are those without the right context. The gate is
    learned and zero at first. Two evaluations of the network.
    """

    def __init__(self, network: nn.Module, pad: int):
        super().__init__()
        self.network, self.pad = network, pad
        self.gate = nn.Parameter(torch.zeros((), device=next(network.parameters()).device))

    def forward(self, x: Tensor, level: Tensor, condition: Any) -> Tensor:
        left = self.network(torch.where(condition["right"], self.pad, x), level, condition)
        both = self.network(x, level, condition)
        barred = left.isinf() | both.isinf()  # out before any arithmetic: it would reach the gate
        left, both = left.masked_fill(barred, 0.0), both.masked_fill(barred, 0.0)
        moved = left + GATE_SCALE * self.gate * (both - left)
        return moved.masked_fill(barred, -torch.inf)


def fading(network: nn.Module, pad: int) -> nn.Module:
    """The network with a right context that fades in; it starts as if there were none."""
    if isinstance(network, MaskedTransformer):
        return GatedTransformer(network)
    return GatedLogits(network, pad)


@dataclass(frozen=True)
class TextPrior:
    """A masked diffusion language model: how it fills a gap.

    `network`: logits or log-probabilities (x [batch, window], level, condition) -> [batch, window,
    V]. p(gap | left context) is the prior; with the right context in view the same network guesses
    the posterior without any reward.
    """

    frame: Frame
    network: nn.Module
    levels: int
    recipe: Mapping[str, Any]
    """How the network is built, without its weights."""

    @property
    def diffusion(self) -> MaskedDiffusion:
        """Tokens of the gap, each revealed in one of the steps, uniformly."""
        slots, mask = self.frame.slots, self.frame.codec.mask
        reveals = IndependentReveals(linear_masking(self.levels), slots)
        device = next(self.network.parameters()).device
        return MaskedDiffusion(slots, mask, reveals).to(device)

    def left_only(self, network: nn.Module | None = None) -> LeftContext:
        """p(gap | left context): the prior."""
        return LeftContext(self.both_sides(network), self.frame.codec.pad)

    def both_sides(self, network: nn.Module | None = None) -> Infilling:
        """The gap by what is left and right of it."""
        codec = self.frame.codec
        return Infilling(TokenLogits(network or self.network, codec.mask, never=self.frame.never))
