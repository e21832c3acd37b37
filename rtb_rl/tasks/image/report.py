"""Side by side: a table of methods against the reference, and a figure of what they draw."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rtb_rl.training import table
from rtb_rl.training.table import Rows

COLUMNS = {
    "E[log r]": ("log_reward", "log_reward_error"),
    "by the judge": ("judged", "judged_error"),
    "TV of classes": ("tv", None),
    "Frechet": ("frechet", None),
    "diversity": ("diversity", "diversity_error"),
    "log Z": ("log_z", "log_z_error"),
    "ESS": ("ess", None),
    "training calls": ("training_calls", None),
    "calls / draw": ("calls", None),
    "s / draw": ("seconds", None),
}
"""Title -> (key of a row, key of its standard error)."""

SIDE = 6  # images a side of a grid
COLUMNS_OF_FIGURE = 5
CUT = 2.5
"""Bars are cut at so many times the median, over the methods, of the largest share of each."""
INCHES_OF_LETTER = 0.05


def reference_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The reference as a row of its own, from a row that was compared with it."""
    names = ("log_reward", "log_reward_error", "judged", "judged_error", "diversity", "log_z")
    found = {name: row.get(f"reference_{name}") for name in names}
    found |= {"log_z_error": row.get("reference_log_z_error"), "ess": row.get("reference_ess")}
    return {**found, "tv": 0.0, "frechet": row["frechet_halves"]}


def mark(row: Mapping[str, Any]) -> str:
    """What is said beside a method's name: whether more than half of its seeds have collapsed."""
    return " (collapsed)" if row["collapsed"] > 0.5 else ""


def markdown(rows: Rows) -> str:
    """The table as Markdown, the reference first; its Frechet distance is that of its halves."""
    return table.markdown(COLUMNS, with_reference(rows, "*reference*"))


def print_table(title: str, rows: Rows) -> None:
    """The same on the console."""
    table.print_table(title, COLUMNS, with_reference(rows, "reference"))


def with_reference(rows: Rows, title: str) -> Rows:
    """The rows with their marks, below the reference that they were compared with."""
    marked = {name + mark(row): row for name, row in rows.items()}
    return {title: reference_row(next(iter(rows.values()))), **marked}


def draw_figure(
    path: Path,
    grids: Mapping[str, Tensor],
    histograms: Mapping[str, Sequence[float]],
    classes: Sequence[str],
):
    """A grid of images [n, C, H, W] in [0, 1] for each name, and below it its class histogram.

    Without a histogram for a name that place stays empty. A bar that leaves the others no room is
    cut, with its share beside it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(grids), COLUMNS_OF_FIGURE)
    bands = -(-len(grids) // columns)
    longest = max(map(len, classes), default=0)
    turned = longest > 2
    figure, axes = pyplot.subplots(
        2 * bands,
        columns,
        figsize=(2.1 * columns, (3.0 + INCHES_OF_LETTER * longest * turned) * bands),
        height_ratios=(3, 1) * bands,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.axis("off")
    highest = highest_shown([max(shares) for shares in histograms.values()])
    for index, (name, images) in enumerate(grids.items()):
        band, column = divmod(index, columns)
        top, bottom = axes[2 * band, column], axes[2 * band + 1, column]
        top.imshow(mosaic(images[: SIDE**2]), cmap="gray", vmin=0, vmax=1)
        top.set_title(name, fontsize=9)
        if name in histograms:
            bottom.axis("on")
            bottom.bar(range(len(classes)), histograms[name], color="#1f77b4")
            rotation = 90 * turned
            bottom.set_xticks(range(len(classes)), list(classes), fontsize=6, rotation=rotation)
            bottom.set_ylim(0, highest)
            bottom.set_yticks([])
            for place, share in enumerate(histograms[name]):
                if share > highest:
                    side = ("right", -0.6) if place > len(classes) / 2 else ("left", 0.6)
                    x, y = place + side[1], 0.9 * highest
                    bottom.text(x, y, f"{share:.2f}", fontsize=6, ha=side[0], va="top")
    figure.savefig(path, dpi=130)
    return figure


def highest_shown(largest: Sequence[float]) -> float:
    """Top of all histograms, by the largest share of each: one collapsed method doesn't flatten the
    others.
    """
    if not largest:
        return 1.0
    return 1.05 * min(max(largest), CUT * statistics.median(largest))


def mosaic(images: Tensor) -> np.ndarray:
    """Images [n, C, H, W] as one picture, SIDE a row, a pixel of white between them: [H', W', C] or
    [H', W'] for one channel. Missing ones are white.
    """
    _, channels, height, width = images.shape
    picture = np.ones((SIDE * (height + 1) - 1, SIDE * (width + 1) - 1, channels))
    for index, image in enumerate(images.cpu().numpy()):
        y, x = index // SIDE * (height + 1), index % SIDE * (width + 1)
        picture[y : y + height, x : x + width] = image.transpose(1, 2, 0)
    return picture[..., 0] if channels == 1 else picture
