"""Tables of finished image runs: one for each data set, target and beta, raw rows beside it.

    rtb-rl bench image_table --runs runs/even-0 runs/even-1 runs/even-baselines --out
    benchmarks/results/images

Writes rows.jsonl (a row a run and method, with the run's manifest), table.md, and for each data set
and target a figure of what the methods draw, beside the figures of the runs of rtb_image. Runs that
differ by their seed alone are one line, with a mean and its error; what else they differ in stands
beside the method.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from safetensors.torch import load

from rtb_rl.errors import InputError
from rtb_rl.tasks.image import to_images
from rtb_rl.tasks.image.finished import Found, groups_of, rows_of
from rtb_rl.tasks.image.report import draw_figure, mark, markdown
from rtb_rl.training import write_comparison
from rtb_rl.training.table import mean_over_seeds, slug


@dataclass(frozen=True)
class Settings:
    """Tables of finished image runs."""

    runs: tuple[Path, ...] = field(default_factory=tuple)
    """Directories of finished runs of rtb_image and image_baselines."""
    out: Path = Path("benchmarks/results/images")
    fast: bool = False
    """Without effect: nothing is trained here."""


def tables(found: Sequence[Found]) -> str:
    """Markdown: a heading and a table for each data set, target and beta."""
    parts = []
    for (data, target, beta), lines in groups_of(found).items():
        means = {
            f"{name}, {len(line)} seeds" if len(line) > 1 else name: mean_over_seeds(
                [one.row for one in line]
            )
            for name, line in lines.items()
        }
        parts.append(f"### {data}, {target}, beta {beta:g}\n\n{markdown(means)}")
    return "\n".join(parts)


def draw_samples(found: Sequence[Found], out: Path) -> None:
    """One figure a table: images of every line and the classes that it draws, of its first run that
    kept some.
    """
    for (data, target, beta), lines in groups_of(found).items():
        grids, shares = {}, {}
        for name, line in lines.items():
            for one in line:
                kept = one.directory / "rows" / f"{slug(one.row['method'])}.safetensors"
                if kept.exists():
                    title = name + mark(one.row)
                    grids[title] = to_images(load(kept.read_bytes())["x0"])
                    shares[title] = one.row["histogram"]
                    break
        if grids:
            classes = [str(label) for label in range(len(next(iter(shares.values()))))]
            path = out / f"{slug(f'{Path(data).stem} {target} beta {beta:g}')}.png"
            draw_figure(path, grids, shares, classes)


def main(settings: Settings) -> None:
    """Collect the runs."""
    if not settings.runs:
        raise InputError("no runs to make a table of; name finished ones with --runs")
    found = [one for directory in settings.runs for one in rows_of(directory)]
    write_comparison(settings.out, [one.row for one in found], tables(found))
    draw_samples(found, settings.out)
    for directory in settings.runs:
        if (directory / "posterior").exists():
            shutil.copy(directory / "figure.png", settings.out / f"{directory.name}.png")


if __name__ == "__main__":
    main(tyro.cli(Settings))
