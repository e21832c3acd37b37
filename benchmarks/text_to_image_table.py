"""Tables of finished text-to-image runs: one for each prior, reward and beta, raw rows beside it.

    rtb-rl bench text_to_image_table --runs runs/shapes-0 runs/shapes-1 runs/shapes-baselines --out
    benchmarks/results/text_to_image

Writes rows.jsonl (a row a run and method, with the run's manifest), table.md, and for each table a
figure of what the methods draw beside the figure of one run, where the target's images are. With
runs at several betas curve.png has reward against diversity. Runs that differ by their seed alone
are one line, with a mean and its error; what else they differ in stands beside the method.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from matplotlib import pyplot
from safetensors.torch import load

from rtb_rl.errors import InputError
from rtb_rl.tasks.image.report import draw_figure, mark
from rtb_rl.tasks.text_to_image import PRIOR
from rtb_rl.tasks.text_to_image.finished import Groups, Lines, groups_of, rows_of
from rtb_rl.tasks.text_to_image.report import markdown
from rtb_rl.tasks.text_to_image.tradeoff import Panel, draw_tradeoff, features_of, point_of
from rtb_rl.training import write_comparison
from rtb_rl.training.table import mean_over_seeds, slug


@dataclass(frozen=True)
class Settings:
    """Tables of finished text-to-image runs."""

    runs: tuple[Path, ...] = field(default_factory=tuple)
    """Directories of finished runs of rtb_text_to_image and text_to_image_baselines."""
    out: Path = Path("benchmarks/results/text_to_image")
    fast: bool = False
    """Without effect: nothing is trained here."""


def means_of(lines: Lines) -> dict[str, dict[str, Any]]:
    """One row a line."""
    return {name: mean_over_seeds([one.row for one in line]) for name, line in lines.items()}


def tables(groups: Groups) -> str:
    """Markdown: a heading, what was asked for and a table for each prior, reward and beta."""
    parts = []
    for title, betas in groups.items():
        for beta, lines in betas.items():
            row = next(iter(lines.values()))[0].row
            prompts = ", ".join(f'"{text}"' for text in row["prompts"])
            rows = {
                f"{name}, {len(lines[name])} seeds" if len(lines[name]) > 1 else name: mean
                for name, mean in means_of(lines).items()
            }
            asked = f"{prompts}; guidance {row['guidance']:g}, {row['levels']} levels"
            parts.append(f"### {title}, beta {beta:g}\n\n{asked}.\n\n{markdown(rows)}")
    return "\n".join(parts)


def of_target(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of the target: the only numbers that rows of all methods have."""
    return {name: value for name, value in row.items() if name.startswith("reference_")}


def panel_of(betas: Mapping[float, Lines]) -> Panel:
    """Points of the target and of every method over beta; the prior is the target at beta 0."""
    exact, methods, features = [], {}, ""
    for beta, lines in betas.items():
        means = means_of(lines)
        prior = means.pop(PRIOR, None)
        if prior is not None and not exact:
            exact.append(point_of(prior, 0.0))
        every = [of_target(one.row) for line in lines.values() for one in line]
        exact.append(point_of(mean_over_seeds(every), beta, prefix="reference_"))
        for name, mean in means.items():
            methods.setdefault(name, []).append(point_of(mean, beta))
        features = features_of(next(iter(lines.values()))[0].row["embedder"])
    return Panel(exact, methods, features)


def draw_samples(path: Path, lines: Lines) -> None:
    """Images of every line's first run that kept some, and the classes that the method draws."""
    images, shares, classes = {}, {}, []
    for name, line in lines.items():
        for one in line:
            kept = one.directory / "rows" / f"{slug(one.row['method'])}.safetensors"
            tensors = load(kept.read_bytes()) if kept.exists() else {}
            if "images" in tensors:
                title, classes = name + mark(one.row), one.row["classes"]
                images[title] = tensors["images"] / 255
                if classes:
                    shares[title] = one.row["shares"]
                break
    if images:
        pyplot.close(draw_figure(path, images, shares, classes))


def copy_figure(path: Path, lines: Lines) -> None:
    """The figure of the first run with a posterior of its own, which also shows the target."""
    for one in (one for line in lines.values() for one in line):
        if (one.directory / "posterior").exists() and (one.directory / "figure.png").exists():
            shutil.copy(one.directory / "figure.png", path)
            return


def draw(groups: Groups, out: Path) -> None:
    """All figures."""
    for title, betas in groups.items():
        for beta, lines in betas.items():
            name = slug(f"{title} beta {beta:g}")
            draw_samples(out / f"{name}.png", lines)
            copy_figure(out / f"{name}_run.png", lines)
    panels = {title: panel_of(betas) for title, betas in groups.items() if len(betas) > 1}
    if panels:
        draw_tradeoff(out / "curve.png", panels)


def joined(runs: Sequence[Path]) -> tuple[list[Mapping[str, Any]], Groups]:
    """All rows, and the same by table and line."""
    if not runs:
        raise InputError("no runs to make a table of; name finished ones with --runs")
    found = [one for directory in runs for one in rows_of(directory)]
    return [one.row for one in found], groups_of(found)


def main(settings: Settings) -> None:
    """Collect the runs."""
    rows, groups = joined(settings.runs)
    write_comparison(settings.out, rows, tables(groups))
    draw(groups, settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings))
