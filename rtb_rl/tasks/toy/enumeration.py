"""Token sequences few enough to list: all masked ones, laws over the clean ones, and conditionals.

Laws are float64. Sequences are listed with the last position running fastest, so that a table over
them is also an array with one axis for each position.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
from torch import Generator, Tensor
from torch.nn import functional


@dataclass(frozen=True)
class TokenSpace:
    """Sequences of `length` tokens 0..V-1 with V = `vocabulary`, which is also the mask."""

    vocabulary: int
    length: int

    @cached_property
    def sequences(self) -> Tensor:
        """Every sequence of tokens and masks: int64 [(V + 1)^length, length]; all mask is last."""
        return _product(self.vocabulary + 1, self.length)

    @cached_property
    def masked(self) -> Tensor:
        """Where `sequences` are masked: bool, of the same shape."""
        return self.sequences == self.vocabulary

    @cached_property
    def clean(self) -> Tensor:
        """Every sequence without mask: int64 [V^length, length]."""
        return _product(self.vocabulary, self.length)

    @cached_property
    def clean_index(self) -> Tensor:
        """The places of the clean sequences among all of them: int64 [V^length]."""
        return self.index(self.clean)

    def index(self, x: Tensor) -> Tensor:
        """The place of each sequence [batch, length] among all of them: int64 [batch]."""
        return _number(x, self.vocabulary + 1)

    def draw(self, law: Tensor, n: int, *, generator: Generator) -> Tensor:
        """`n` draws from a law [V^length] of clean sequences: int64 [n, length]."""
        return self.clean[law.multinomial(n, True, generator=generator)]

    def clean_rows(self, x: Tensor) -> Tensor:
        """The place of each clean sequence [batch, length] among the clean ones: int64 [batch]."""
        return _number(x, self.vocabulary)

    def frequencies(self, x: Tensor) -> Tensor:
        """The share of each clean sequence among draws [n, length]: [V^length]."""
        counts = self.clean_rows(x).bincount(minlength=len(self.clean))
        return counts.double() / len(x)

    def conditionals(self, law: Tensor) -> Tensor:
        """p(token at each position | the tokens not masked), for a positive law [V^length] of clean
        sequences: [(V + 1)^length, length, V].
        """
        agrees = (self.sequences[:, None] == self.clean) | self.masked[:, None]
        weight = agrees.all(-1).double() * law
        tokens = functional.one_hot(self.clean, self.vocabulary).double()
        joint = (weight @ tokens.flatten(1)).unflatten(-1, tokens.shape[1:])
        return joint / weight.sum(1)[:, None, None]

    def coupled_logits(self, *, generator: Generator) -> Tensor:
        """Random logits in which tokens matter in pairs, of variance 1: [V^length].

        A table of normal numbers for each pair of positions; of one position, for that.
        """
        pairs = list(combinations(range(self.length), 2)) or [(0, 0)]
        size = (len(pairs), self.vocabulary, self.vocabulary)
        tables = torch.randn(size, generator=generator, dtype=torch.float64)
        first, second = self.clean[:, pairs].unbind(-1)
        return tables[torch.arange(len(pairs)), first, second].sum(1) / len(pairs) ** 0.5


def total_variation(law: Tensor, other: Tensor) -> float:
    """Half the sum of absolute differences of two laws [n]."""
    return float((law - other).abs().sum() / 2)


def tilted(law: Tensor, log_reward: Tensor) -> Tensor:
    """law * exp(log_reward), normalised: [n]."""
    return (law.log() + log_reward).softmax(0)


def _product(size: int, length: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(size)] * length).reshape(-1, length)


def _number(x: Tensor, base: int) -> Tensor:
    return (x * base ** torch.arange(x.shape[1] - 1, -1, -1)).sum(1)
