"""Figures of the exactness benchmark."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from rtb_rl.exactness.fit import Row
from rtb_rl.tasks.toy import plotting_coordinates

RTB, PEER = "#c44e52", "#4c72b0"


def draw_figures(out: Path, rows: Sequence[Row]) -> None:
    """Every figure whose cases were run."""
    panels = {
        "prior": (out / "nine-0" / "draws.safetensors", "prior"),
        "target": (out / "nine-0" / "draws.safetensors", "target"),
        "RTB": (out / "nine-0" / "draws.safetensors", "posterior"),
    }
    for stage, title in (
        ("RTB", "RTB, on-policy alone"),
        ("KL-REINFORCE_on_log_r", "KL-REINFORCE on log r"),
        ("published_RL_loss", "published RL loss, w = 0.5"),
    ):
        panels[title] = (out / "nine_controls-0" / stage / "draws.safetensors", "posterior")
    if there := {title: panel for title, panel in panels.items() if panel[0].exists()}:
        draw_densities(out / "densities.png", there)
    curves = {
        "rtb-rl, 40 levels": sorted(out.glob("nine-*/curve.jsonl")),
        "torchgfn, 100 levels": sorted(out.glob("torchgfn.jsonl")),
    }
    if any(curves.values()):
        draw_convergence(out / "convergence.png", curves)
    if any(row["case"].startswith("levels: ") for row in rows):
        draw_levels(out / "levels.png", rows)


def draw_densities(path: Path, panels: Mapping[str, tuple[Path, str]]) -> None:
    """25 -> 9: where the draws lie. `panels`: title -> (draws.safetensors, which draws in it)."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(panels), figsize=(2.7 * len(panels), 2.9), squeeze=False)
    edges = np.linspace(-13, 13, 105)
    for axis, (title, (file, name)) in zip(axes[0], panels.items(), strict=True):
        x = plotting_coordinates(load_file(file)[name]).numpy()
        counts, _, _ = np.histogram2d(x[:, 0], x[:, 1], [edges, edges])
        axis.imshow(
            np.log1p(counts.T),
            origin="lower",
            extent=(-13, 13, -13, 13),
            cmap="magma_r",
            vmin=0,
            vmax=4.5,
        )
        axis.set_title(title, fontsize=9)
        axis.set_xticks([-10, 0, 10])
        axis.set_yticks([-10, 0, 10])
        axis.tick_params(labelsize=7)
    _save(figure, path)


def draw_convergence(path: Path, curves: Mapping[str, Sequence[Path]]) -> None:
    """Total variation of the 25 -> 9 weights against seconds of training, a line a seed."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(5, 3.4))
    for (name, files), colour in zip(curves.items(), (RTB, PEER), strict=True):
        for index, file in enumerate(files):
            points = read_curve(file)
            axis.plot(
                [p["seconds"] for p in points],
                [p["tv"] for p in points],
                color=colour,
                lw=1.3,
                label=name if index == 0 else None,
            )
    axis.axhline(0.05, color="black", lw=0.6, ls=":")
    _finish(axis, "seconds of training, one core", "TV of mode weights")
    _save(figure, path)


def draw_levels(path: Path, rows: Sequence[Row]) -> None:
    """Error against the number of levels: rows named `levels: NAME, T = K`."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(5, 3.4))
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        name, found, levels = row["case"].removeprefix("levels: ").rpartition(", T = ")
        if found and row["case"].startswith("levels: "):
            lines.setdefault(name, {})[int(levels)] = row["value"]
    for name, points in lines.items():
        colour = RTB if "learned" in name else PEER
        style = "--" if "floor" in name else "-"
        marker = None if "floor" in name else "o"
        axis.plot(
            *zip(*sorted(points.items()), strict=True),
            style,
            color=colour,
            label=name,
            marker=marker,
            ms=4,
        )
    axis.set_xscale("log")
    _finish(axis, "levels T", "TV to the exact posterior")
    _save(figure, path)


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Lines with `seconds` and `tv` of a curve.jsonl or of a peer's evaluations."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line.get("event", "evaluation") == "evaluation"]


def _finish(axis: Any, x: str, y: str) -> None:
    axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.legend(fontsize=8)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    _pyplot().close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
