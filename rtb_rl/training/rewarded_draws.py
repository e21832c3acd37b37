"""Draws of a prior with their rewards, for one or several conditions, and choices among these."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from rtb_rl.core import conditions, importance_log_z
from rtb_rl.core.protocols import Condition
from rtb_rl.training.scoring import score
from rtb_rl.training.task import Task

BATCH = 1000
"""Draws rewarded together."""


class Sampled(NamedTuple):
    """Some of the draws: `x0` [n, *event], `rows` and `log_weight` [n, m], and `correction` [n], by
    which means over them are means over all draws.
    """

    x0: Tensor
    rows: Tensor
    log_weight: Tensor
    correction: Tensor


@dataclass(frozen=True)
class RewardedDraws:
    """Draws of the prior and their rewards for the conditions that each may belong to.

    `x0` [n, *event]; `condition`: B rows, or None; `rows` int64 [n, m]: for each draw the rows of
    the condition whose prior it is a draw of; `log_weight` [n, m] = beta log r - log Z of each, and
    `log_z` [B], nats.
    """

    x0: Tensor
    condition: Condition
    rows: Tensor
    log_weight: Tensor
    log_z: Tensor

    @classmethod
    def of_one_prior(
        cls, task: Task, x0: Tensor, condition: Condition, beta: float
    ) -> "RewardedDraws":
        """Draws [n, *event] of a prior that does not depend on the condition: all fit all rows."""
        count = conditions.count(condition) or 1
        parts = []
        for points in x0.split(BATCH):
            every_row = torch.arange(count, device=x0.device).repeat(len(points))
            each = conditions.take(condition, every_row)
            repeated = points.repeat_interleave(count, 0)
            parts.append(score(task, repeated, each)[0].reshape(-1, count))
        log_weight = beta * torch.cat(parts)
        rows = torch.arange(count, device=x0.device).expand(len(x0), count)
        return cls.weighted(x0, condition, rows, log_weight)

    @classmethod
    def of_each_prior(
        cls, x0: Tensor, condition: Condition, log_reward: Tensor, beta: float
    ) -> "RewardedDraws":
        """Draws [B, n, *event] of the priors of B rows, with log r [B, n]."""
        count, n = log_reward.shape
        rows = torch.arange(count, device=x0.device).repeat_interleave(n)[:, None]
        return cls.weighted(x0.flatten(0, 1), condition, rows, beta * log_reward.reshape(-1, 1))

    @classmethod
    def weighted(
        cls, x0: Tensor, condition: Condition, rows: Tensor, log_weight: Tensor
    ) -> "RewardedDraws":
        """The weights divided by their mean over the draws of each row, which is its Z."""
        count = int(rows.max()) + 1
        found = [importance_log_z(log_weight[rows == row].double())[0] for row in range(count)]
        log_z = torch.stack(found).to(log_weight.dtype)
        return cls(x0, condition, rows, log_weight - log_z[rows], log_z)

    @cached_property
    def _share(self) -> Tensor:
        """n times the probability of each draw: half by its weight, half as it comes."""
        return (1 + self.log_weight.exp().mean(1)) / 2

    def sample(self, n: int, times: int, *, generator: Generator) -> Sampled:
        """`n` draws, at most `times` rows for each.

        Those of great weight are seen oftener and count for less: times its correction the mean
        weight of a draw is below 2, where a rare point of the target may weigh a thousand.
        """
        device, held = generator.device, self.rows.shape[1]
        index = torch.multinomial(self._share, n, replacement=True, generator=generator)
        rows, log_weight = self.rows[index], self.log_weight[index]
        if held > times:
            chosen = torch.randint(held, (n, times), generator=generator, device=device)
            rows, log_weight = rows.gather(1, chosen), log_weight.gather(1, chosen)
        return Sampled(self.x0[index], rows, log_weight, 1 / self._share[index])


def coupled_choice(first: Tensor, second: Tensor, *, generator: Generator) -> tuple[Tensor, Tensor]:
    """An index by each of two laws [n, m], equal as often as can be: int64 [n] both.

    They differ with the probability of the total variation between the laws.
    """
    one = torch.multinomial(first, 1, generator=generator)
    uniform = torch.rand((len(first), 1), generator=generator, device=generator.device)
    same = uniform * first.gather(1, one) <= second.gather(1, one)
    rest = (second - first).clamp(min=0)
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, second)
    other = torch.multinomial(rest, 1, generator=generator)
    return one[:, 0], torch.where(same, one, other)[:, 0]
