"""What is said of a method's infills: reward, overlap with people's, variety, fluency."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtb_rl.baselines import ImportanceReference
from rtb_rl.errors import InputError
from rtb_rl.tasks.language.language_model import LanguageModel
from rtb_rl.tasks.language.metrics import bert_score, bleu, distinct, gleu, repetition, words
from rtb_rl.tasks.language.prompts import Gap
from rtb_rl.tasks.language.rewards import TextReward


@dataclass(frozen=True)
class Infills:
    """Texts of a method, the same number for every gap, and what they cost.

    `gaps[i]` are those of prompt i. Where the method has them, a row each: `log_z` and `ess`.
    `calls`: network calls a text; `seconds` a text.
    """

    gaps: Sequence[Sequence[Gap]]
    calls: float
    seconds: float
    log_z: Tensor | None = None
    ess: Tensor | None = None
    elbo: Tensor | None = None
    training_calls: int = 0
    training_seconds: float = 0.0


@dataclass(frozen=True)
class Examiner:
    """The reward, a second language model that is never a reward, and the importance-weighted
    reference of the reward to the power `beta`; `human` is what people wrote in the gaps.
    """

    reward: TextReward
    judge: LanguageModel
    human: Sequence[Gap]
    reference: ImportanceReference
    bert_model: str | None = None
    beta: float = 1.0

    def examine(self, infills: Infills) -> dict[str, Any]:
        """One row of the table. Means over prompts, with the standard error of that mean.

        "log_reward_gap" is E[log r] above that of the reference, by pairs of the same prompt, and
        "log_z_gap" the mean absolute difference of log Z from the reference's.
        """
        flat = [gap for row in infills.gaps for gap in row]
        rows, each = len(infills.gaps), len(flat) // len(infills.gaps)
        log_reward = self.reward(flat).double().cpu().reshape(rows, each).mean(1)
        wanted = self.reference.mean(self.reference.log_weight / self.beta)[0].cpu()
        texts, human = self._texts(flat), self._texts(self.human)
        written = [text for text in human for _ in range(each)]
        return {
            **_mean("log_reward", log_reward),
            **_mean("log_reward_gap", log_reward - wanted),
            **self._log_z(infills),
            **_mean("bleu", _by_row(bleu(texts, written), each)),
            **_mean("gleu", _by_row(gleu(texts, written), each)),
            "bert_score": self._bert_score(texts, written),
            "distinct_2": distinct(texts) if any(len(words(each)) > 1 for each in texts) else None,
            "repetition": repetition(texts, [gap.left for gap in flat]),
            "perplexity": self._perplexity(flat),
            "calls": infills.calls,
            "seconds": infills.seconds,
            "training_calls": infills.training_calls,
            "training_seconds": infills.training_seconds,
            "draws": len(flat),
        }

    def _log_z(self, infills: Infills) -> dict[str, Any]:
        known = self.reference.log_z.cpu()
        found: dict[str, Any] = dict.fromkeys(("log_z", "log_z_gap", "elbo", "ess"))
        if infills.log_z is not None:
            log_z = infills.log_z.double().cpu()
            found |= _mean("log_z", log_z) | _mean("log_z_gap", (log_z - known).abs())
            found["log_z_bias"] = float((log_z - known).mean())
        if infills.elbo is not None:
            found["elbo"] = float(infills.elbo.mean())
        if infills.ess is not None:
            found["ess"] = float(infills.ess.double().mean())
        return found

    def _perplexity(self, gaps: Sequence[Gap]) -> float | None:
        """None where every text is empty, as a gap that ends itself may be."""
        told = [gap for gap in gaps if words(gap.middle or "")]
        if not told:
            return None
        return self.judge.perplexity([gap.left for gap in told], self._texts(told))

    def _texts(self, gaps: Sequence[Gap]) -> list[str]:
        return [gap.middle or "" for gap in gaps]

    def _bert_score(self, texts: list[str], written: list[str]) -> float | None:
        if self.bert_model is None:
            return None
        found = bert_score(texts, written, model=self.bert_model)
        return sum(found) / len(found)


def _by_row(values: Sequence[float], each: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, each).mean(1)


def _mean(name: str, rows: Tensor) -> dict[str, float]:
    """The mean over prompts and its standard error."""
    if len(rows) < 2:
        raise InputError("an evaluation needs two prompts or more")
    return {name: float(rows.mean()), f"{name}_error": float(rows.std() / math.sqrt(len(rows)))}
