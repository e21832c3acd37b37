"""Scores of a comparison with few runs: means, aggregates over tasks, and bootstrap intervals.

A run's score is the mean of its episodes' scores. A run is the unit: seeds differ by more than
episodes do, so an interval over pooled episodes would be too narrow. Aggregates are those of
arXiv 2108.13264: interquartile mean, performance profile, probability of improvement, with
intervals from resampling runs inside each task.

All intervals are 95 % percentile-bootstrap intervals with a fixed seed of their own for each call:
a number doesn't change when other agents join the comparison.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
SEED = 0
QUANTILES = (0.025, 0.975)
COVERAGE = {3: 0.78, 5: 0.86, 10: 0.92}
"""Runs -> how often the interval of `mean_score` holds the truth, measured on simulated runs."""

Runs = Sequence[np.ndarray]
"""Scores of an agent's runs: one array [runs] a task."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; both ends None where there's nothing to resample."""

    value: float
    low: float | None = None
    high: float | None = None

    def reaches(self, value: float) -> bool:
        """Whether the interval, or the number itself, goes up to `value`."""
        return max(self.value, self.value if self.high is None else self.high) >= value


@dataclass(frozen=True, eq=False)
class Profile:
    """Share of runs above each threshold, with the ends of a pointwise 95 % band; all [taus]."""

    taus: np.ndarray
    share: np.ndarray
    low: np.ndarray
    high: np.ndarray


def mean_score(episodes: Sequence[np.ndarray]) -> Estimate:
    """Mean over runs of the mean over episodes; `episodes` is one array [episodes] a run.

    The interval is that of a hierarchical bootstrap: runs are drawn with replacement, then the
    episodes of each drawn run. With one run it covers episodes alone and says nothing on seeds;
    with one episode in all there's none.

    The fewer runs, the more optimistic: where runs spread normally and as widely as their 20
    episodes, it holds the truth in COVERAGE of cases.
    """
    value = float(np.mean([run.mean() for run in episodes]))
    if len(episodes) == 1 and len(episodes[0]) == 1:
        return Estimate(value)
    generator = np.random.default_rng(SEED)
    chosen = generator.integers(len(episodes), size=(DRAWS, len(episodes)))
    means = np.empty(chosen.shape)
    for index, run in enumerate(episodes):
        here = chosen == index
        drawn = generator.integers(len(run), size=(int(here.sum()), len(run)))
        means[here] = run[drawn].mean(1)
    return _estimate(value, means.mean(1))


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last axis.

    floor(n / 4) of the n scores are left out at each end.
    """
    count = scores.shape[-1]
    cut = count // 4
    return np.sort(scores, axis=-1)[..., cut : count - cut].mean(-1)


def resampled(runs: Runs, generator: np.random.Generator) -> np.ndarray:
    """[DRAWS, all runs], `balanced`: those of each task drawn with replacement from its own."""
    drawn = [scores[generator.integers(len(scores), size=(DRAWS, len(scores)))] for scores in runs]
    return balanced(drawn)


def balanced(scores: Sequence[np.ndarray]) -> np.ndarray:
    """The scores of all tasks along one axis, [..., runs] each: tasks with fewer runs than others
    have theirs repeated until all count alike, as they do where each has the same number.
    """
    most = math.lcm(*(task.shape[-1] for task in scores))
    return np.concatenate(
        [np.repeat(task, most // task.shape[-1], axis=-1) for task in scores], axis=-1
    )


def aggregate_score(runs: Runs) -> Estimate:
    """Interquartile mean over all runs of all tasks, with a stratified bootstrap interval.

    Tasks count alike, however many runs each has.
    """
    draws = interquartile_mean(resampled(runs, np.random.default_rng(SEED)))
    value = float(interquartile_mean(balanced(runs)))
    return Estimate(value) if _single(runs) else _estimate(value, draws)


def performance_profile(runs: Runs, taus: np.ndarray) -> Profile:
    """Share of runs with a score above each of `taus`, mean over tasks, with a stratified band."""
    draws = resampled(runs, np.random.default_rng(SEED))
    scores = balanced(runs)
    shares = np.stack([(draws > tau).mean(1) for tau in taus], axis=1)
    low, high = np.quantile(shares, QUANTILES, axis=0)
    return Profile(taus, np.array([(scores > tau).mean() for tau in taus]), low, high)


def probability_of_improvement(first: Runs, second: Runs) -> Estimate:
    """P(a run of `first` scores above one of `second` on the same task), averaged over tasks.

    The Mann-Whitney statistic over the number of pairs, a tie counting one half. In the interval
    the runs of both are drawn anew, each inside its task; where an agent has one run in every task
    there's none.
    """
    generator = np.random.default_rng(SEED)
    values, draws = [], np.zeros(DRAWS)
    for ours, theirs in zip(first, second, strict=True):
        wins = (ours[:, None] > theirs) + 0.5 * (ours[:, None] == theirs)
        rows = generator.integers(len(ours), size=(DRAWS, len(ours)))
        columns = generator.integers(len(theirs), size=(DRAWS, len(theirs)))
        values.append(wins.mean())
        draws += wins[rows[:, :, None], columns[:, None, :]].mean((1, 2))
    value = float(np.mean(values))
    if _single(first) or _single(second):  # that side would stand still while the other is drawn
        return Estimate(value)
    return _estimate(value, draws / len(values))


def _single(runs: Runs) -> bool:
    return all(len(scores) == 1 for scores in runs)


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = np.quantile(draws, QUANTILES)
    return Estimate(value, float(low), float(high))
