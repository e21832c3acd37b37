"""What a comparison says over all its tasks, and its headline."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rtb_rl.sweep.comparison import Comparison, scores
from rtb_rl.sweep.statistics import (
    Estimate,
    Profile,
    Runs,
    aggregate_score,
    mean_score,
    performance_profile,
    probability_of_improvement,
)

PROFILE_POINTS = 201


@dataclass(frozen=True)
class Aggregates:
    """Estimates of every cell, and over the tasks with reference returns for complete agents."""

    cells: Mapping[tuple[str, str], Estimate]
    """(task, agent) -> mean score; cells without a run are absent."""
    interquartile: Mapping[str, Estimate]
    """Agent -> interquartile mean over runs and tasks."""
    profiles: Mapping[str, Profile]
    improvement: Mapping[tuple[str, str], Estimate]
    """(X, Y) -> P(X > Y)."""
    single: frozenset[str]
    """Agents with one run on some task, which no bootstrap of runs moves."""

    @property
    def leader(self) -> str | None:
        """The agent of the highest interquartile mean; None without a complete agent."""
        values = {agent: estimate.value for agent, estimate in self.interquartile.items()}
        return max(values, key=lambda agent: values[agent], default=None)


def aggregate(comparison: Comparison) -> Aggregates:
    """Every estimate of a comparison."""
    cells = {
        (task, agent): mean_score([scores(row) for row in rows])
        for task in comparison.tasks
        for agent in comparison.agents
        if (rows := comparison.of(task, agent))
    }
    runs: dict[str, Runs] = {
        agent: [comparison.runs(task, agent) for task in comparison.normalised_tasks]
        for agent in comparison.complete
    }
    taus = _taus(runs)
    return Aggregates(
        cells,
        {agent: aggregate_score(own) for agent, own in runs.items()},
        {agent: performance_profile(own, taus) for agent, own in runs.items()},
        {
            (first, second): probability_of_improvement(runs[first], runs[second])
            for first in runs
            for second in runs
            if first != second
        },
        frozenset(agent for agent, own in runs.items() if any(len(task) == 1 for task in own)),
    )


def headline(comparison: Comparison, aggregates: Aggregates) -> str:
    """The result in one sentence."""
    leader = aggregates.leader
    if leader is None:
        reason = (
            "no agent has run every task"
            if comparison.normalised_tasks
            else ("no task has reference returns")
        )
        return f"There is no order over all tasks, because {reason}; see the scores task by task."
    tasks, others = len(comparison.normalised_tasks), len(aggregates.interquartile) - 1
    runs = sum(len(comparison.runs(task, leader)) for task in comparison.normalised_tasks)
    estimate = aggregates.interquartile[leader]
    found = (
        f"{leader} has the highest interquartile mean of {others + 1} agents"
        if others
        else f"{leader} has an interquartile mean"
    )
    text = f"Over {counted(tasks, 'task')}, {found}: {spelled(estimate)}, {counted(runs, 'run')}"
    close = [
        agent
        for agent in aggregates.interquartile
        if agent != leader and not _ahead(aggregates, leader, agent)
    ]
    if not others:
        return f"{text}."
    if not close:
        return f"{text}; its runs are more likely than not to beat those of each other agent."
    if len(close) == others > 1:
        return f"{text}; the runs don't set it apart from any other."
    *most, last = close
    named = f"{', '.join(most)} and {last}" if most else last
    return f"{text}; the runs don't set it apart from {named}."


def spelled(estimate: Estimate, digits: int = 1) -> str:
    """52.1 (95 % interval 48.0 to 55.3)."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.{digits}f} (no interval)"
    ends = f"{estimate.low:.{digits}f} to {estimate.high:.{digits}f}"
    return f"{estimate.value:.{digits}f} (95 % interval {ends})"


def counted(number: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ahead(aggregates: Aggregates, leader: str, other: str) -> bool:
    """Whether the interval says so: one that single runs make too narrow doesn't."""
    estimate = aggregates.improvement[leader, other]
    moved = not aggregates.single & {leader, other}
    return moved and estimate.low is not None and estimate.low > 0.5


def _taus(runs: Mapping[str, Runs]) -> np.ndarray:
    """Thresholds from below the lowest score to above the highest."""
    if not runs:
        return np.zeros(0)
    values = np.concatenate([scores for own in runs.values() for scores in own])
    margin = max(0.02 * np.ptp(values), 1.0)
    return np.linspace(values.min() - margin, values.max() + margin, PROFILE_POINTS)
