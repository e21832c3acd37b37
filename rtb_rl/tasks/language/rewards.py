"""Log-rewards of texts, and how a masked diffusion sees them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtb_rl.core import LogReward
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.tasks.language.language_model import ROWS, LanguageModel
from rtb_rl.tasks.language.metrics import words
from rtb_rl.tasks.language.prompts import Gap, Prompts

TextReward = Callable[[Sequence[Gap]], Tensor]
"""log r of texts whose gap is filled in, nats, without beta: [n]. Any black box."""


@dataclass(frozen=True)
class ContinuationLikelihood:
    """log p(right | left, middle), summed over the tokens of the right context.

    The reward of arXiv 2405.20971 section 3.3. Texts are tokenised anew, so that the language model
    may have a tokenizer of its own.
    """

    model: LanguageModel

    def __call__(self, gaps: Sequence[Gap]) -> Tensor:
        if bad := next((gap for gap in gaps if not gap.right.strip()), None):
            raise InputError(
                f"{bad.left[:40]!r}... has no right context, and this reward is the likelihood of"
                " that; give one, or another reward"
            )
        before = [" ".join(filter(None, (gap.left, gap.middle))) for gap in gaps]
        return self.model.log_prob(before, [gap.right for gap in gaps])


@dataclass(frozen=True)
class ClassLikelihood:
    """log p(label | whole text) of a transformers sequence classifier with its tokenizer."""

    model: Any
    tokenizer: Any
    label: int

    @torch.no_grad()
    def __call__(self, gaps: Sequence[Gap]) -> Tensor:
        texts = [" ".join(filter(None, (gap.left, gap.middle, gap.right))) for gap in gaps]
        parts = []
        for begin in range(0, len(texts), ROWS):
            rows = texts[begin : begin + ROWS]
            told = self.tokenizer(rows, return_tensors="pt", padding=True, truncation=True)
            parts.append(self.model(**told.to(self.model.device)).logits.float().cpu())
        return torch.cat(parts).log_softmax(-1)[:, self.label]


@dataclass(frozen=True)
class Contains:
    """-`price` for each of the words that the middle lacks, whatever their case."""

    words: tuple[str, ...]
    price: float = 5.0

    def __call__(self, gaps: Sequence[Gap]) -> Tensor:
        wanted = {word.lower() for word in self.words}
        lacking = [len(wanted - set(words(_middle(gap)))) for gap in gaps]
        return -self.price * torch.tensor(lacking, dtype=torch.float32)


@dataclass(frozen=True)
class WordCount:
    """-(words - goal)^2 / (2 width^2) of the middle."""

    goal: float
    width: float = 1.0

    def __call__(self, gaps: Sequence[Gap]) -> Tensor:
        counts = torch.tensor([len(words(_middle(gap))) for gap in gaps])
        return -((counts - self.goal) / self.width).square() / 2


def token_log_reward(reward: TextReward, prompts: Prompts) -> LogReward:
    """The reward of points [batch, slots] in the gaps of these prompts: [batch]."""

    def log_reward(x0: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, dict)
        found = reward(prompts.written(x0, condition))
        return found.to(x0.device) if isinstance(found, Tensor) else found

    return log_reward


def _middle(gap: Gap) -> str:
    return gap.middle or ""
