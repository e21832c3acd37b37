"""How far image samples are from the posterior asked for, against importance-sampled prior draws.

The reference has the law of prior * r^beta / Z on the very chain that is judged, with error bars,
so that more reward than it has is an error like less: a method above it has collapsed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from rtb_rl.baselines.selection import ImportanceReference
from rtb_rl.core import LogReward, conditions
from rtb_rl.core.protocols import Condition
from rtb_rl.nn.convolution import ConvClassifier
from rtb_rl.tasks.image.images import to_images
from rtb_rl.tasks.image.metrics import (
    clustered_error,
    diversity,
    frechet_distance,
    total_variation,
    weighted_diversity,
)

BATCH = 2000
FRECHET_DRAWS = 500
"""At most so many enter a Frechet distance, which shrinks as they grow."""
ROUNDING = 1e-6  # nats: what a constant reward may differ by from itself
COLLAPSED = 3.0
"""Standard errors of E[log r] above the reference from which a method counts as collapsed."""

Row = dict[str, float | None]


@dataclass(frozen=True)
class Judgement:
    """What is measured of images: reward, the same by a judge, the judge's classes and features.

    One row an image; log-densities in nats.
    """

    log_reward: Tensor
    judged: Tensor
    probabilities: Tensor
    features: Tensor


@dataclass(frozen=True)
class Judge:
    """A classifier that was never a reward, and the target's reward as it would be by it."""

    classifier: ConvClassifier
    log_reward: LogReward
    judged_reward: LogReward

    @torch.no_grad()
    def __call__(self, x0: Tensor, condition: Condition) -> Judgement:
        """Of points in model space [n, C, H, W] and a condition of n rows."""
        parts = []
        for begin in range(0, len(x0), BATCH):
            rows = slice(begin, begin + BATCH)
            x, c = x0[rows], conditions.take(condition, rows)
            images = to_images(x)
            features = self.classifier.features(images)
            log_probs = functional.log_softmax(self.classifier(images).double(), -1)
            parts.append(
                (self.log_reward(x, c), self.judged_reward(x, c), log_probs.exp(), features)
            )
        return Judgement(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Reference:
    """What the target is, by importance sampling, for one condition row (or none)."""

    draws: ImportanceReference
    judgement: Judgement
    condition: Condition

    @classmethod
    def of(cls, draws: Tensor, judge: Judge, condition: Condition, *, beta: float) -> "Reference":
        """From prior draws [n, C, H, W]; `condition` has one row, or is None."""
        judgement = judge(draws, conditions.repeat(condition, len(draws)))
        weight = (beta * judgement.log_reward.double()).unsqueeze(0)
        return cls(ImportanceReference(draws.unsqueeze(0), weight), judgement, condition)

    def mean(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The target's mean of values [n, ...], and its standard error."""
        mean, error = self.draws.mean(values.unsqueeze(0).double())
        return mean[0], error[0]

    def resampled(self, values: Tensor, count: int, *, generator: Generator) -> Tensor:
        """Rows of values by weight: [count, ...]."""
        held = ImportanceReference(values.unsqueeze(0), self.draws.log_weight)
        return held.resample(count, generator=generator)[0]

    def half_distance(self, count: int, *, generator: Generator) -> float:
        """The Frechet distance of two halves of the reference, `count` draws of each: what exact
        draws could be expected to have.
        """
        features = ImportanceReference(self.judgement.features.unsqueeze(0), self.draws.log_weight)
        first, second = (half.resample(count, generator=generator)[0] for half in features.split())
        return frechet_distance(first, second)


def compare(
    x0: Tensor,
    reference: Reference,
    judge: Judge,
    *,
    source: Tensor | None = None,
    generator: Generator,
) -> Row:
    """Samples [n, C, H, W] of one condition against the reference.

    `log_reward`, `judged` (E[log r] by the reward's classifier and by the judge's) with standard
    errors and their excess over the reference in standard errors; `tv` between the judge's mean
    class probabilities; `frechet` distance in the judge's features to as many resampled reference
    draws, and `frechet_halves`, the same between two halves of the reference; `diversity`, the mean
    pairwise cosine distance of those features; `collapsed`, 1 where the reward is above the
    reference by more than its error explains. `source` [n] as `Draws` has it: where draws hang
    together errors say so, or are None.
    """
    found = judge(x0, conditions.repeat(reference.condition, len(x0)))
    row: Row = {}
    for name in ("log_reward", "judged"):
        wanted = reference.mean(getattr(reference.judgement, name))
        row |= excess(name, getattr(found, name), *wanted, source)
    classes, _ = reference.mean(reference.judgement.probabilities)
    count = min(len(x0), reference.draws.log_weight.shape[1] // 2, FRECHET_DRAWS)
    features = reference.resampled(reference.judgement.features, count, generator=generator)
    spread = diversity(found.features)
    return {
        **row,
        "tv": total_variation(found.probabilities.mean(0), classes),
        "frechet": frechet_distance(found.features[:count], features),
        "frechet_halves": reference.half_distance(count, generator=generator),
        "diversity": spread.mean,
        "diversity_error": spread.standard_error if source is None else None,
        "reference_diversity": weighted_diversity(
            reference.judgement.features, reference.draws.log_weight[0]
        ),
        "collapsed": collapsed(row),
    }


def collapsed(row: Row) -> float:
    """1 where the reward is above the reference by more than its error explains; 0 where it has no
    error.
    """
    above = row["log_reward_excess"]
    return float(above is not None and above > COLLAPSED)


def average_rows(rows: Sequence[Row]) -> Row:
    """Means of the columns over conditions, with the errors of such means; `collapsed` is the share
    of the conditions. None where a condition has no such number.
    """
    found: Row = {}
    for name in rows[0]:
        values = [value for row in rows if (value := row[name]) is not None]
        total = math.hypot(*values) if name.endswith("_error") else sum(values)
        found[name] = total / len(rows) if len(values) == len(rows) else None
    return found


def excess(
    name: str,
    values: Tensor,
    wanted: Tensor,
    wanted_error: Tensor,
    source: Tensor | None = None,
) -> Row:
    """The mean of values [n] with its standard error, beside the mean that is wanted, and how many
    standard errors it is above that; keys begin with the name. None for what needs an error where
    all values are of one `source`.
    """
    error, mean = clustered_error(values, source), float(values.double().mean())
    scale = None if error is None else max(math.hypot(error, float(wanted_error)), ROUNDING)
    return {
        name: mean,
        f"{name}_error": error,
        f"reference_{name}": float(wanted),
        f"reference_{name}_error": float(wanted_error),
        f"{name}_excess": None if scale is None else (mean - float(wanted)) / scale,
    }
