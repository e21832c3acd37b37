"""Which masked positions a denoising step reveals: the part of a masked chain without network."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core.schedules import MaskingSchedule


class RevealLaw(Protocol):
    """The law of the positions revealed in each step; the same for prior and posterior.

    `masked` and `revealed`: bool [batch, length], the second a part of the first; `level`: int64
    [batch], 1..K, that of the step's start. `shift`: [batch, length] or None, added to the log-odds
    of each position; ValueError from a law that can't take one.
    """

    @property
    def levels(self) -> int:
        """K, the number of steps."""
        ...

    @property
    def length(self) -> int:
        """The number of positions."""
        ...

    def times(self, batch: int, *, generator: Generator) -> Tensor:
        """The k whose step k -> k - 1 reveals each position: int64 [batch, length], 1..K.

        A draw from the chain of all steps: at level k the positions with time <= k are masked.
        """
        ...

    def probability(self, masked: Tensor, level: Tensor) -> Tensor:
        """The probability of each position to be revealed in this step, 0 where not masked:
        [batch, length].
        """
        ...

    def draw(
        self, masked: Tensor, level: Tensor, shift: Tensor | None, *, generator: Generator
    ) -> Tensor:
        """The positions revealed in this step: bool [batch, length]."""
        ...

    def log_prob(
        self, revealed: Tensor, masked: Tensor, level: Tensor, shift: Tensor | None
    ) -> Tensor:
        """log p(revealed), nats: [batch]; -inf for what can't be drawn."""
        ...


class IndependentReveals(nn.Module):
    """Every masked position for itself, with probability rho_k in the step from level k.

    A shift changes the log-odds of rho_k. It does nothing at level 1, where rho_1 = 1. The usual
    law of masked diffusion (arXiv 2406.07524).
    """

    log_odds: Tensor
    masked_share: Tensor

    def __init__(self, schedule: MaskingSchedule, length: int):
        super().__init__()
        self.levels, self.length = schedule.levels, length
        self.register_buffer("log_odds", schedule.reveal_probability.logit())
        self.register_buffer("masked_share", 1 - schedule.kept)

    def times(self, batch: int, *, generator: Generator) -> Tensor:
        share = self.masked_share
        uniform = torch.rand(
            (batch, self.length), generator=generator, device=share.device, dtype=share.dtype
        )
        return torch.searchsorted(share, uniform, right=True)

    def probability(self, masked: Tensor, level: Tensor) -> Tensor:
        return torch.where(masked, self._shifted(level, None).sigmoid(), 0.0)

    def draw(
        self, masked: Tensor, level: Tensor, shift: Tensor | None, *, generator: Generator
    ) -> Tensor:
        uniform = _uniform_like(masked, generator)
        return masked & (uniform < self._shifted(level, shift).sigmoid())

    def log_prob(
        self, revealed: Tensor, masked: Tensor, level: Tensor, shift: Tensor | None
    ) -> Tensor:
        log_odds = self._shifted(level, shift)
        terms = nn.functional.logsigmoid(torch.where(revealed, log_odds, -log_odds))
        return torch.where(masked, terms, 0.0).sum(1)

    def _shifted(self, level: Tensor, shift: Tensor | None) -> Tensor:
        log_odds = self.log_odds[level].unsqueeze(1)
        return log_odds if shift is None else log_odds + shift


class FixedOrder(nn.Module):
    """`per_step` positions a step, in a given order: order[0] is revealed first, from level K.

    With one position a step the exact posterior of any prior and reward is a chain of this kind, so
    that a loss of zero can be reached.
    """

    time: Tensor

    def __init__(self, order: Tensor | Sequence[int], per_step: int = 1):
        super().__init__()
        order = torch.as_tensor(order)
        self.length = len(order)
        if not torch.equal(order.sort().values, torch.arange(self.length, device=order.device)):
            raise ValueError(
                f"an order of {self.length} positions must hold each of 0..{self.length - 1} once,"
                f" not {order.tolist()}"
            )
        self.levels = _steps(self.length, per_step)
        rank = order.argsort()
        self.register_buffer("time", self.levels - rank // per_step)

    def times(self, batch: int, *, generator: Generator) -> Tensor:
        return self.time.expand(batch, -1)

    def probability(self, masked: Tensor, level: Tensor) -> Tensor:
        return self._due(masked, level).double()

    def draw(
        self, masked: Tensor, level: Tensor, shift: Tensor | None, *, generator: Generator
    ) -> Tensor:
        _refuse_shift(self, shift)
        return self._due(masked, level)

    def log_prob(
        self, revealed: Tensor, masked: Tensor, level: Tensor, shift: Tensor | None
    ) -> Tensor:
        _refuse_shift(self, shift)
        return _log_indicator((revealed == self._due(masked, level)).all(1))

    def _due(self, masked: Tensor, level: Tensor) -> Tensor:
        return masked & (self.time >= level.unsqueeze(1))


class RandomOrder(nn.Module):
    """`per_step` positions a step, a uniformly random subset of those still masked.

    The step from level 1 reveals all that remain. With one position a step this is any-order
    autoregression (arXiv 2110.02037).
    """

    def __init__(self, length: int, per_step: int = 1):
        super().__init__()
        self.length, self.per_step = length, per_step
        self.levels = _steps(length, per_step)

    def times(self, batch: int, *, generator: Generator) -> Tensor:
        uniform = torch.rand(
            (batch, self.length),
            generator=generator,
            device=generator.device,
            dtype=torch.float64,
        )
        return self.levels - uniform.argsort(1) // self.per_step

    def probability(self, masked: Tensor, level: Tensor) -> Tensor:
        share = self._count(masked, level) / masked.sum(1).clamp(min=1).double()
        return torch.where(masked, share.unsqueeze(1), 0.0)

    def draw(
        self, masked: Tensor, level: Tensor, shift: Tensor | None, *, generator: Generator
    ) -> Tensor:
        _refuse_shift(self, shift)
        uniform = _uniform_like(masked, generator)
        rank = torch.where(masked, uniform, 1.0).argsort(1).argsort(1)  # the masked come first
        return masked & (rank < self._count(masked, level).unsqueeze(1))

    def log_prob(
        self, revealed: Tensor, masked: Tensor, level: Tensor, shift: Tensor | None
    ) -> Tensor:
        """-log binomial(masked, revealed) where as many are revealed as must be."""
        _refuse_shift(self, shift)
        among, count = masked.sum(1).double(), revealed.sum(1).double()
        subsets = (among + 1).lgamma() - (count + 1).lgamma() - (among - count + 1).lgamma()
        return _log_indicator(count == self._count(masked, level)) - subsets

    def _count(self, masked: Tensor, level: Tensor) -> Tensor:
        remaining = masked.sum(1)
        return torch.where(level == 1, remaining, remaining.clamp(max=self.per_step))


def _uniform_like(masked: Tensor, generator: Generator) -> Tensor:
    return torch.rand(masked.shape, generator=generator, device=masked.device, dtype=torch.float64)


def _log_indicator(possible: Tensor) -> Tensor:
    zeros = torch.zeros(possible.shape, dtype=torch.float64, device=possible.device)
    return zeros.masked_fill(~possible, -torch.inf)


def _refuse_shift(law: nn.Module, shift: Tensor | None) -> None:
    if shift is not None:
        raise ValueError(
            f"{type(law).__name__} reveals a certain number of positions and has no log-odds that a"
            " shift could change; use IndependentReveals, or a denoiser without reveal_shift"
        )


def _steps(length: int, per_step: int) -> int:
    if length < 1 or per_step < 1:
        raise ValueError(
            f"a chain needs at least one position and one a step, not {length} and {per_step}"
        )
    return -(-length // per_step)
