"""How agents look in figures, and the parts that figures share.

Seven colours that colour-blind readers tell apart (after Okabe and Ito), then the same ones with
another marker and line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtb_rl.sweep.statistics import Estimate

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#808080")
MARKERS = ("o", "s", "^", "D")
LINES = ("-", "--", ":", "-.")
INK = "#1b1f24"
"""Colour of all text and axes; the page replaces it by that of its own text."""
COLUMNS = 3
LEGEND_LINE = 0.215  # inches
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "text.parse_math": False,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
    "svg.fonttype": "none",
    "svg.hashsalt": "rtb-rl",
} | {f"{name}color": INK for name in ("text.", "axes.label", "axes.edge", "xtick.", "ytick.")}


@dataclass(frozen=True)
class Look:
    """How an agent is drawn."""

    colour: str
    marker: str
    line: str


@dataclass(frozen=True)
class Drawn:
    """A figure on disk: its stem, what it shows, and its SVG and number of panels."""

    name: str
    title: str
    caption: str
    svg: Path
    panels: int = 1


def looks(agents: Sequence[str]) -> dict[str, Look]:
    """One look an agent, by its place among all agents of the comparison."""
    kinds = len(COLOURS)
    return {
        agent: Look(
            COLOURS[index % kinds],
            MARKERS[index // kinds % len(MARKERS)],
            LINES[index // kinds % len(LINES)],
        )
        for index, agent in enumerate(agents)
    }


def bar(axis, estimate: Estimate, height: float, look: Look) -> None:
    """The value as a marker on a bar from end to end of its interval."""
    if estimate.low is not None:
        axis.hlines(height, estimate.low, estimate.high, color=look.colour, lw=2.2, alpha=0.75)
    axis.plot(estimate.value, height, look.marker, color=look.colour, ms=5.5, clip_on=False)


def agent_axis(axis, order: Sequence[str], named: bool = True) -> None:
    """An agent a line, the first lowest."""
    axis.set_yticks(range(len(order)), order if named else [""] * len(order))
    axis.set_ylim(-0.6, len(order) - 0.4)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=INK, alpha=0.12, lw=0.6)
    axis.set_axisbelow(True)


def panel(lines: int) -> tuple[Any, Any]:
    """Figure and axes, readable on a narrow screen, as high as this many agents need."""
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(4.6, 0.75 + 0.3 * lines), layout="constrained")


def grid(panels: int, height: float) -> tuple[Any, list[Any]]:
    """Figure and axes of panels in rows of at most COLUMNS; `height` of each in inches."""
    from matplotlib import pyplot

    columns = min(panels, COLUMNS)
    rows = -(-panels // columns)
    size = (4.6 if columns == 1 else 3.0 * columns, height * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[panels:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:panels])


def legend(figure, *axes) -> None:
    """Below the panels, in as many columns as its names leave room for; the figure grows by it."""
    handles = {name: h for axis in axes for h, name in zip(*axis.get_legend_handles_labels())}
    inches = 0.55 + 0.075 * max(map(len, handles))
    columns = max(1, min(len(handles), int(figure.get_figwidth() / inches)))
    lines = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * lines)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def save(out: Path, name: str, drawing: tuple[Any, str, str]) -> Drawn:
    """Write a (figure, title, caption) as SVG and PNG, and close it."""
    from matplotlib import pyplot

    figure, title, caption = drawing
    svg = out / f"{name}.svg"
    figure.savefig(svg, transparent=True, metadata={"Date": None, "Creator": None})
    figure.savefig(out / f"{name}.png", dpi=150)
    pyplot.close(figure)
    return Drawn(name, title, caption, svg, len(figure.axes))
