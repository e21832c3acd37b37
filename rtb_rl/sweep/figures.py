"""Figures of a comparison, each as PNG and SVG. An agent has one look in all of them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rtb_rl.sweep.aggregates import Aggregates
from rtb_rl.sweep.comparison import Comparison, Row, scores
from rtb_rl.sweep.drawing import (
    COLUMNS,
    INK,
    STYLE,
    Drawn,
    Look,
    agent_axis,
    bar,
    grid,
    legend,
    looks,
    panel,
    save,
)
from rtb_rl.sweep.statistics import Estimate, mean_score


def draw_figures(
    out: Path, comparison: Comparison, aggregates: Aggregates, focus: str | None
) -> list[Drawn]:
    """Every figure that the rows allow; `focus` is the agent that the others are set against."""
    import matplotlib

    matplotlib.use("Agg")
    style = looks(comparison.agents)
    with matplotlib.rc_context(STYLE):
        drawn = [
            save(out, "aggregate", draw_aggregate(aggregates, style))
            if aggregates.interquartile
            else None,
            save(out, "task_scores", draw_scores(comparison, aggregates, style)),
            save(out, "profiles", draw_profiles(aggregates, style))
            if aggregates.profiles
            else None,
            save(out, "improvement", draw_improvement(aggregates, style, focus))
            if focus and len(aggregates.interquartile) > 1
            else None,
            save(out, "curves", draw_curves(comparison, style))
            if any(True for task in comparison.tasks for _ in task_curves(comparison, task))
            else None,
        ]
    return [figure for figure in drawn if figure]


def draw_aggregate(aggregates: Aggregates, style: Mapping[str, Look]) -> tuple[Any, str, str]:
    """Interquartile mean and interval, a line an agent, the best on top."""
    order = sorted(aggregates.interquartile, key=lambda a: aggregates.interquartile[a].value)
    figure, axis = panel(len(order))
    for height, agent in enumerate(order):
        bar(axis, aggregates.interquartile[agent], height, style[agent])
    agent_axis(axis, order)
    axis.set_xlabel("normalised score")
    caption = f"Over all runs and tasks with reference returns{_bars(aggregates)}."
    return figure, "Interquartile mean", caption


def draw_scores(
    comparison: Comparison, aggregates: Aggregates, style: Mapping[str, Look]
) -> tuple[Any, str, str]:
    """A panel a task: every seed a point, mean and interval above it."""
    order = list(reversed(comparison.agents))
    figure, axes = grid(len(comparison.tasks), 0.75 + 0.3 * len(order))
    for position, (task, axis) in enumerate(zip(comparison.tasks, axes, strict=True)):
        for height, agent in enumerate(order):
            estimate = aggregates.cells.get((task, agent))
            if estimate is None:
                continue
            runs = comparison.runs(task, agent)
            look = style[agent]
            axis.scatter(
                runs, np.full(len(runs), height - 0.2), s=13, color=look.colour, alpha=0.65, lw=0
            )
            bar(axis, estimate, height + 0.12, look)
        agent_axis(axis, order, named=position % COLUMNS == 0)
        axis.set_title(task, loc="left")
        axis.margins(x=0.08)
        axis.set_xlabel(unit(comparison, task))
    caption = "Small points: one seed each, its mean over episodes. Above: mean and 95 % interval."
    return figure, "Scores by task", caption


def draw_profiles(aggregates: Aggregates, style: Mapping[str, Look]) -> tuple[Any, str, str]:
    """Share of runs above each score, with pointwise bands."""
    figure, axis = panel(9)
    for agent, profile in aggregates.profiles.items():
        look = style[agent]
        axis.step(
            profile.taus, profile.share, look.line, where="post", color=look.colour, label=agent
        )
        axis.fill_between(
            profile.taus,
            profile.low,
            profile.high,
            step="post",
            color=look.colour,
            alpha=0.1,
            lw=0,
        )
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlim(profile.taus[0], profile.taus[-1])
    axis.set_xlabel("normalised score")
    axis.set_ylabel("share of runs above it")
    legend(figure, axis)
    bands = "; bands are pointwise, 95 %" if _bars(aggregates) else ""
    caption = f"Over all runs of all tasks with reference returns{bands}."
    return figure, "Performance profiles", caption


def draw_improvement(
    aggregates: Aggregates, style: Mapping[str, Look], focus: str
) -> tuple[Any, str, str]:
    """P(a run of `focus` scores above one of each other agent)."""
    versus = {other: p for (one, other), p in aggregates.improvement.items() if one == focus}
    order = sorted(versus, key=lambda other: versus[other].value)
    figure, axis = panel(len(order))
    axis.axvline(0.5, color=INK, lw=0.7, ls=":")
    for height, other in enumerate(order):
        bar(axis, versus[other], height, style[other])
    agent_axis(axis, order)
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel(f"P({focus} above it)")
    caption = (
        f"Probability that a run of {focus} scores above one of each other agent on the same task, "
        f"averaged over tasks{_bars(aggregates)}. At the dotted line neither is better."
    )
    return figure, f"Probability that {focus} improves on others", caption


def draw_curves(comparison: Comparison, style: Mapping[str, Look]) -> tuple[Any, str, str]:
    """Score against the share of training done: mean over seeds, and its interval as a band."""
    tasks = [t for t in comparison.tasks if any(True for _ in task_curves(comparison, t))]
    figure, axes = grid(len(tasks), 2.5)
    for position, (task, axis) in enumerate(zip(tasks, axes, strict=True)):
        for agent, points in task_curves(comparison, task):
            share, estimates = zip(*points, strict=True)
            look = style[agent]
            values = [estimate.value for estimate in estimates]
            bands = [(e.low, e.high) if e.low is not None else (e.value,) * 2 for e in estimates]
            axis.plot(
                share,
                values,
                look.line,
                color=look.colour,
                lw=1.4,
                marker=look.marker,
                ms=2.5,
                label=agent,
            )
            axis.fill_between(share, *zip(*bands, strict=True), color=look.colour, alpha=0.1, lw=0)
        axis.set_title(task, loc="left")
        axis.set_xlabel("training done, %")
        if position % COLUMNS == 0 or task not in comparison.normalised_tasks:
            axis.set_ylabel(unit(comparison, task))
    legend(figure, *axes)
    caption = (
        "Mean over seeds at the points that all of a cell's seeds have, against the share of each "
        "agent's own training; bands are 95 % intervals. A point has few episodes."
    )
    return figure, "Learning curves", caption


def _bars(aggregates: Aggregates) -> str:
    """What bars are, where there are any: with one run a task there are none."""
    there = any(estimate.low is not None for estimate in aggregates.interquartile.values())
    return "; bars are 95 % intervals" if there else ""


def unit(comparison: Comparison, task: str) -> str:
    """What scores of a task are."""
    return "normalised score" if task in comparison.normalised_tasks else "return"


def task_curves(
    comparison: Comparison, task: str
) -> Iterator[tuple[str, list[tuple[float, Estimate]]]]:
    """(agent, its curve) for those that have points on the task."""
    for agent in comparison.agents:
        if points := list(curve_points(comparison.of(task, agent))):
            yield agent, points


def curve_points(rows: Sequence[Row]) -> Iterator[tuple[float, Estimate]]:
    """(per cent of the training done, score) at each step that the curves of all rows hold."""
    curves = [{point["step"]: point for point in row["curve"]} for row in rows if row.get("curve")]
    shared = set.intersection(*map(set, curves)) if curves else set()
    for step in sorted(shared):
        episodes = [scores(rows[0], curve[step]["returns"]) for curve in curves]
        yield 100 * step / curves[0][step]["steps"], mean_score(episodes)
