"""The figure of reward against diversity, as the strength of the reward grows.

More reward at less diversity than the exact target has is not a better posterior: what counts is
how near a method is to the target's point of the same beta, and to its line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rtb_rl.tasks.text_to_image.evaluation import FIELDS

COLUMNS = 2
EXACT = "exact target\n(weighted draws of the prior)"


class Point(NamedTuple):
    """E[log r] in nats and the mean pairwise cosine distance at one beta, with standard errors
    where they are known.
    """

    beta: float
    log_reward: float
    log_reward_error: float | None
    diversity: float
    diversity_error: float | None


@dataclass(frozen=True)
class Panel:
    """The points of one prior and reward, in the order of beta; `features`: whose distances."""

    exact: Sequence[Point]
    methods: Mapping[str, Sequence[Point]]
    features: str


def point_of(row: Mapping[str, Any], beta: float, *, prefix: str = "") -> Point:
    """The point of a row of a comparison; with the prefix "reference_" that of its target."""
    return Point(
        beta,
        row[f"{prefix}log_reward"],
        row.get(f"{prefix}log_reward_error"),
        row[f"{prefix}diversity"],
        row.get(f"{prefix}diversity_error"),
    )


def features_of(embedder: str | None) -> str:
    """What diversity is measured in, in words."""
    fields = f"colours averaged over {FIELDS} x {FIELDS} fields"
    return fields if embedder is None else f"features of {embedder}"


def draw_tradeoff(path: Path, panels: Mapping[str, Panel]) -> Figure:
    """One panel a prior and reward: a line of points a method, each with its beta beside it."""
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7.2 * columns, 4.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, panel) in zip(axes.flat, panels.items()):
        _draw_panel(axis, panel)
        axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=130)
    return figure


def _draw_panel(axis: Axes, panel: Panel) -> None:
    _draw_line(axis, EXACT, panel.exact, "black", fmt="s--", zorder=1, markerfacecolor="white")
    marks = "ovD^<>P*X"
    for index, (name, points) in enumerate(panel.methods.items()):
        fmt = f"{marks[index % len(marks)]}-"
        _draw_line(axis, name, points, f"C{index % 10}", fmt=fmt, zorder=2)
    axis.set_xlabel(f"diversity: mean pairwise cosine distance of\n{panel.features}")
    axis.set_ylabel("E[log r], nats")
    axis.margins(0.08)
    beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
    axis.legend(**beside, fontsize=7, title="beside each point: beta", title_fontsize=7)


def _draw_line(axis: Axes, name: str, points: Sequence[Point], colour: str, **how: Any) -> None:
    diversity = [point.diversity for point in points]
    log_reward = [point.log_reward for point in points]
    axis.errorbar(
        diversity,
        log_reward,
        xerr=[point.diversity_error or 0.0 for point in points],
        yerr=[point.log_reward_error or 0.0 for point in points],
        label=name,
        color=colour,
        markersize=5,
        linewidth=1.2,
        capsize=2,
        **how,
    )
    for point, x, y in zip(points, diversity, log_reward, strict=True):
        where = {"xytext": (5, 4), "textcoords": "offset points"}
        axis.annotate(f"{point.beta:g}", (x, y), **where, color=colour, fontsize=7)
