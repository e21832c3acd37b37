"""Autoregressive language models: likelihoods of texts given texts, and sampling."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from rtb_rl.core.kernels import exponential_race
from rtb_rl.errors import InputError
from rtb_rl.tasks.language.codec import TextCodec

ROWS = 256  # sequences evaluated at once


@dataclass(frozen=True)
class LanguageModel:
    """p(text) token by token. `network`: causal, with `at(tokens, row, place) -> logits [n, V]`.

    Every text begins with the end token.
    """

    network: Any
    codec: TextCodec
    window: int | None = None
    """Tokens that the network can read; None: any number."""

    @torch.no_grad()
    def log_prob(self, before: Sequence[str], texts: Sequence[str]) -> Tensor:
        """log p(text | before), the sum over the tokens of each text, nats: float32 [n].

        InputError for a text without tokens, or longer than the window.
        """
        first = self.codec.encode(list(before))
        then = self.codec.encode([f" {text}" for text in texts])
        for text, ids, left in zip(texts, then, first, strict=True):
            if not ids:
                raise InputError(f"the text {text!r}, whose likelihood is asked for, has no tokens")
            self._check(len(left) + len(ids))
        order = sorted(range(len(then)), key=lambda i: len(first[i]) + len(then[i]))
        answer = torch.zeros(len(then))
        for begin in range(0, len(order), ROWS):
            rows = order[begin : begin + ROWS]
            answer[rows] = self._scores([first[i] for i in rows], [then[i] for i in rows])
        return answer

    def perplexity(self, before: Sequence[str], texts: Sequence[str]) -> float:
        """exp of the mean negative log-likelihood of a token of the texts, each given `before`.

        Texts without tokens have no part in it; InputError where none has any.
        """
        lengths = list(map(len, self.codec.encode([f" {text}" for text in texts])))
        if not any(lengths):
            raise InputError(
                f"{len(lengths)} texts without a token have no perplexity; give others"
            )
        pairs = [pair for *pair, length in zip(before, texts, lengths, strict=True) if length]
        log_prob = self.log_prob([left for left, _ in pairs], [text for _, text in pairs])
        return math.exp(-float(log_prob.double().sum()) / sum(lengths))

    @torch.no_grad()
    def sample(
        self, before: Sequence[str], lengths: Sequence[int], *, generator: Generator
    ) -> list[str]:
        """Texts of so many tokens that go on from each of `before`; no special tokens.

        InputError where there is no room for them in the window.
        """
        device = self._device
        ids = [[self.codec.end, *each] for each in self.codec.encode(list(before))]
        longest = max(map(len, ids)) + max(lengths)
        self._check(longest - 1)
        tokens = torch.full((len(ids), longest), self.codec.pad)
        for i, row in enumerate(ids):
            tokens[i, : len(row)] = torch.tensor(row)
        tokens, place = tokens.to(device), torch.tensor([len(row) - 1 for row in ids]).to(device)
        row = torch.arange(len(ids), device=device)
        barred = torch.tensor([i for i in (*self.codec.never, self.codec.end)], device=device)
        for _ in range(max(lengths)):
            logits = self.network.at(tokens[:, :-1], row, place).float()
            logits = logits[:, : self.codec.vocabulary]  # some networks have rows for no token
            barred = barred[barred < logits.shape[-1]]
            log_probs = logits.index_fill(-1, barred, -torch.inf).log_softmax(-1)
            place = place + 1
            tokens[row, place] = exponential_race(log_probs, generator=generator)
        drawn = tokens.tolist()
        starts = map(len, ids)
        return self.codec.decode(
            [r[s : s + n] for r, s, n in zip(drawn, starts, lengths, strict=True)]
        )

    def _scores(self, first: Sequence[list[int]], then: Sequence[list[int]]) -> Tensor:
        tokens = in_batch([[*a, *b] for a, b in zip(first, then, strict=True)], self.codec)
        tokens = tokens.to(self._device)
        places = [range(len(a), len(a) + len(b)) for a, b in zip(first, then, strict=True)]
        row = torch.tensor([i for i, each in enumerate(places) for _ in each], device=tokens.device)
        place = torch.tensor([j for each in places for j in each], device=tokens.device)
        log_probs = self.network.at(tokens[:, :-1], row, place).float().log_softmax(-1)
        taken = log_probs.gather(-1, tokens[row, place + 1].unsqueeze(-1)).squeeze(-1)
        return taken.new_zeros(len(first)).index_add(0, row, taken).cpu()

    def _check(self, length: int) -> None:
        """InputError for a text of more tokens than the window; of the last nothing is asked."""
        if self.window is not None and length > self.window:
            raise InputError(
                f"a text of {length} tokens is longer than the {self.window} that the language"
                " model can read; shorten the contexts"
            )

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device


def in_batch(rows: Sequence[Sequence[int]], codec: TextCodec) -> Tensor:
    """The end token and then each row, padded: int64 [n, longest + 1]."""
    longest = max(map(len, rows))
    padded = [[codec.end, *row] + [codec.pad] * (longest - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64)
