"""Selection among prior draws: the best of several, or one by weight; and the ground truth that
weighted prior draws give.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rtb_rl.baselines.draws import CountedDenoiser, Draws, check_count, tempered
from rtb_rl.core import (
    Denoiser,
    Diffusion,
    LogReward,
    Sampler,
    conditions,
    effective_sample_size,
    importance_log_z,
    systematic_resampling,
)
from rtb_rl.core.protocols import Condition

BATCH = 4096
"""Prior draws made together, so that memory does not grow with the number of candidates."""


@dataclass(frozen=True)
class ImportanceReference:
    """Prior draws with weights r^beta: prior * r^beta / Z of the chain itself, with error bars.

    `x0`: [rows, count, *event]; `log_weight` = beta log r: float64 [rows, count], nats. One row
    without condition.
    """

    x0: Tensor
    log_weight: Tensor

    @property
    def log_z(self) -> Tensor:
        """log mean r^beta: [rows]."""
        return importance_log_z(self.log_weight)[0]

    @property
    def standard_error(self) -> Tensor:
        """Of `log_z`, by the delta method: [rows]."""
        return importance_log_z(self.log_weight)[1]

    @property
    def ess(self) -> Tensor:
        """Effective share of the draws, between 1 / count and 1: [rows]."""
        return effective_sample_size(self.log_weight)

    def mean(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The target's mean of values [rows, count, *shape] of the draws, and its standard error:
        [rows, *shape] both.

        Self-normalised: sum w v / sum w, with variance sum w^2 (v - mean)^2 / (sum w)^2.
        """
        axes = (1,) * (values.ndim - 2)
        weight = self.log_weight.softmax(1).reshape(*self.log_weight.shape, *axes)
        mean = (weight * values).sum(1)
        error = weight * (values - mean.unsqueeze(1))
        return mean, error.square().sum(1).sqrt()

    def resample(self, n: int, *, generator: Generator) -> Tensor:
        """`n` draws of each row by weight: [rows, n, *event]; they repeat where few are effective.

        Systematic resampling, in random order.
        """
        return self.resample_with_source(n, generator=generator)[0]

    def resample_with_source(self, n: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
        """The same, and which of the draws each is: int64 [rows, n]."""
        index = systematic_resampling(self.log_weight.softmax(1), n, generator=generator)
        rows = torch.arange(len(index), device=index.device)[:, None]
        return self.x0[rows, index], index

    def split(self) -> tuple["ImportanceReference", "ImportanceReference"]:
        """The first half of the draws and the second, independent of each other: how far apart
        they are is what any sampler may be from one of them.
        """
        half = self.log_weight.shape[1] // 2
        return (
            ImportanceReference(self.x0[:, :half], self.log_weight[:, :half]),
            ImportanceReference(self.x0[:, half:], self.log_weight[:, half:]),
        )


def importance_reference(
    diffusion: Diffusion,
    denoiser: Denoiser,
    log_reward: LogReward,
    condition: Condition,
    count: int,
    *,
    beta: float = 1.0,
    batch: int = BATCH,
    generator: Generator,
) -> ImportanceReference:
    """`count` prior draws for each row with their weights; `batch` draws are made together, and
    another `batch` gives other draws.
    """
    check_count("count", count)
    x0, score = _candidates(
        Sampler(diffusion, denoiser),
        tempered(log_reward, beta),
        condition,
        count,
        batch,
        generator=generator,
    )
    return ImportanceReference(x0, score)


def importance_resampling(
    diffusion: Diffusion,
    denoiser: Denoiser,
    log_reward: LogReward,
    condition: Condition,
    n: int,
    *,
    beta: float = 1.0,
    candidates: int = 256,
    batch: int = BATCH,
    generator: Generator,
) -> Draws:
    """`n` draws by weight r^beta out of `candidates` prior draws of each row; consistent.

    candidates * K / n calls a draw. With `ess` * candidates below n, draws repeat.
    """
    check_count("candidates", candidates)
    counted = CountedDenoiser(denoiser)
    reference = importance_reference(
        diffusion,
        counted,
        log_reward,
        condition,
        candidates,
        beta=beta,
        batch=batch,
        generator=generator,
    )
    x0, source = reference.resample_with_source(n, generator=generator)
    calls = counted.calls / (n * len(x0))
    kept, source = (x0[0], source[0]) if condition is None else (x0, source)
    return Draws(kept, calls, reference.log_z, reference.ess, source)


def best_of_n(
    diffusion: Diffusion,
    denoiser: Denoiser,
    log_reward: LogReward,
    condition: Condition,
    n: int,
    *,
    beta: float = 1.0,
    candidates: int = 8,
    batch: int = BATCH,
    generator: Generator,
) -> Draws:
    """For each draw the best of `candidates` prior draws; candidates * K calls.

    A law of its own, not prior * r^beta / Z: its KL from the prior is log N - (N - 1) / N nats for
    N candidates without ties, whatever the reward, and of `beta` the sign alone matters.
    """
    check_count("candidates", candidates)
    counted = CountedDenoiser(denoiser)
    x0, score = _candidates(
        Sampler(diffusion, counted),
        tempered(log_reward, beta),
        condition,
        n * candidates,
        batch,
        generator=generator,
    )
    best = score.reshape(-1, candidates).argmax(1)
    first = torch.arange(len(best), device=best.device) * candidates
    kept = x0.flatten(0, 1)[first + best].reshape(-1, n, *x0.shape[2:])
    calls = counted.calls / len(best)
    return Draws(kept[0] if condition is None else kept, calls)


@torch.no_grad()
def _candidates(
    sampler: Sampler,
    reward: LogReward,
    condition: Condition,
    count: int,
    batch: int,
    *,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """`count` draws of each row [rows, count, *event] and their rewards, float64 [rows, count]."""
    total = count * (conditions.count(condition) or 1)
    each = conditions.repeat(condition, count)
    points, scores = [], []
    for part, rows in conditions.split(each, total, batch):
        x0 = sampler.sample(part, rows if condition is None else 1, generator=generator)
        x0 = x0 if condition is None else x0.flatten(0, 1)
        points.append(x0)
        scores.append(reward(x0, part).double())
    x0 = torch.cat(points)
    return x0.reshape(-1, count, *x0.shape[1:]), torch.cat(scores).reshape(-1, count)
