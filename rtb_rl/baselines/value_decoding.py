"""Soft value-based decoding: of several candidates for each step, one is kept by its value.

Nothing is trained and no gradient is taken (SVDD, arXiv 2408.08252, algorithm 1). The value of a
noisy point is estimated at the denoiser's prediction there, the paper's variant without a learned
value (posterior mean, "PM").
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from rtb_rl.baselines.draws import CountedDenoiser, Draws, as_rows, check_count, tempered
from rtb_rl.baselines.selection import BATCH
from rtb_rl.baselines.steering import CleanEstimate, Move, predicted_mean
from rtb_rl.core import (
    Denoiser,
    Diffusion,
    LogReward,
    MaskedDiffusion,
    OnDemandLogProbs,
    conditions,
)
from rtb_rl.core.kernels import exponential_race
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError


def svdd(
    diffusion: Diffusion,
    denoiser: Denoiser,
    log_reward: LogReward,
    condition: Condition,
    n: int,
    *,
    beta: float = 1.0,
    candidates: int = 10,
    temperature: float = 1.0,
    clean: CleanEstimate = predicted_mean,
    batch: int = BATCH,
    generator: Generator,
) -> Draws:
    """For each step of each draw one of `candidates` prior steps, with probability proportional to
    exp(value / temperature); SVDD-PM.

    The value is log mean r^beta over the points that `clean` makes of the prediction at a
    candidate, and beta log r itself of a clean one. At temperature 1 (the paper's alpha is
    temperature / beta) the law tends to prior * r^beta / Z with many candidates where each value is
    log E[r(x0)^beta | x], and is off by what values miss; at temperature 0 the best is kept, as in
    the released code: a search, which has no target law. candidates * (K - 1) + 1 calls a draw: a
    kept candidate's prediction makes the next step. `batch` candidates are looked at together, and
    another `batch` gives other draws. InputError for no candidate, a negative temperature, tokens
    without `drawn_tokens`, or a denoiser on demand.
    """
    _check(diffusion, candidates, temperature, clean, batch)
    counted = CountedDenoiser(denoiser)
    reward = tempered(log_reward, beta)
    decoder = _Decoder(diffusion, counted, reward, clean, candidates, temperature)
    total, together = n * (conditions.count(condition) or 1), max(1, batch // candidates)
    each, parts = conditions.repeat(condition, n), []
    for begin in range(0, total, together):
        part = conditions.take(each, slice(begin, begin + together))
        parts.append(decoder.draw(part, min(together, total - begin), generator=generator))
    return Draws(as_rows(torch.cat(parts), condition, n), counted.calls / total)


@dataclass(frozen=True)
class _Decoder:
    """The chain of kept candidates; `reward` is beta log r."""

    diffusion: Diffusion
    denoiser: CountedDenoiser
    reward: LogReward
    clean: CleanEstimate
    candidates: int
    temperature: float

    @torch.no_grad()
    def draw(self, condition: Condition, count: int, *, generator: Generator) -> Tensor:
        """x[0], one for each row of the condition: [count, *event]."""
        x = self.diffusion.start(count, generator=generator)
        move = self._predict(x, self.diffusion.levels, condition)
        each = conditions.repeat(condition, self.candidates)
        index = torch.arange(count, device=x.device).repeat_interleave(self.candidates)
        for k in range(self.diffusion.levels, 1, -1):
            x = self._steps(move, x, k, index, generator)
            move = self._predict(x, k - 1, each)
            points = self.clean(move.prediction, x, generator=generator)
            kept = self._choose(self._value(points, each), generator)
            x, move = x[kept], move.take(kept)
        x = self._steps(move, x, 1, index, generator)
        return x[self._choose(self.reward(x, each).double(), generator)]

    def _predict(self, x: Tensor, k: int, condition: Condition) -> Move:
        prediction = self.denoiser(x, self._level(x, k), condition)
        if isinstance(prediction, OnDemandLogProbs):
            raise InputError(
                "svdd values a candidate by its whole prediction, and this denoiser predicts on"
                " demand; pass the denoiser that OnDemand wraps"
            )
        return Move(prediction)

    def _steps(self, move: Move, x: Tensor, k: int, index: Tensor, generator: Generator) -> Tensor:
        """Candidates for x[k - 1], those of a draw next to each other."""
        wide = x[index]
        kernel: Any = self.diffusion.kernel(move.take(index).prediction, wide, self._level(wide, k))
        return kernel.sample(generator=generator)

    def _value(self, points: Tensor, condition: Condition) -> Tensor:
        """log mean r^beta of clean points [draws, batch, *event]: float64 [batch]."""
        values = torch.stack([self.reward(x0, condition) for x0 in points]).double()
        return values.logsumexp(0) - math.log(len(values))

    def _choose(self, value: Tensor, generator: Generator) -> Tensor:
        """The row of the kept candidate of each draw: int64 [count]."""
        by_draw = value.reshape(-1, self.candidates)
        if self.temperature == 0:
            best = by_draw.argmax(1)
        else:
            best = exponential_race(by_draw / self.temperature, generator=generator)
        return torch.arange(len(best), device=best.device) * self.candidates + best

    @staticmethod
    def _level(x: Tensor, k: int) -> Tensor:
        return torch.full((len(x),), k, dtype=torch.int64, device=x.device)


def _check(
    diffusion: Diffusion, candidates: int, temperature: float, clean: CleanEstimate, batch: int
) -> None:
    for name, value in (("candidates", candidates), ("batch", batch)):
        check_count(name, value)
    if not 0 <= temperature < math.inf:
        raise InputError(
            f"temperature is {temperature}; give a positive number, or 0 to keep the best"
        )
    if clean is predicted_mean and isinstance(diffusion, MaskedDiffusion):
        raise InputError(
            "predicted_mean has no point for the probabilities of a MaskedDiffusion's tokens; pass"
            " clean=drawn_tokens(mask)"
        )
