"""Tables of finished image runs: one for each data set, target and beta, raw rows beside it.

    rtb-rl bench image_table --runs runs/even-0 runs/even-1 runs/even-baselines --out
    benchmarks/results/images

Writes rows.jsonl (a row a run and method, with the run's manifest), table.md, and for each data set
and target a figure of what the methods draw, beside the figures of the runs of rtb_image.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from safetensors.torch import load

from rtb_rl.errors import InputError
from rtb_rl.tasks.image import to_images
from rtb_rl.tasks.image.report import draw_figure, mark, markdown
from rtb_rl.training import write_comparison
from rtb_rl.training.table import mean_over_seeds, slug

Rows = Sequence[Mapping[str, Any]]
ALIKE = ("data_sha256", "prior", "prior_seed", "levels")
"""What the runs of one table must have in common."""


@dataclass(frozen=True)
class Settings:
    """Tables of finished image runs."""

    runs: tuple[Path, ...] = field(default_factory=tuple)
    """Directories of finished runs of rtb_image and image_baselines."""
    out: Path = Path("benchmarks/results/images")
    fast: bool = False
    """Without effect: nothing is trained here."""


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """One row a method of a finished run."""
    path = directory / "results.json"
    if not path.exists():
        raise InputError(f"{directory} has no results.json; finish that run first")
    results = json.loads(path.read_text())
    config = json.loads((directory / "config.json").read_text())
    manifest = json.loads((directory / "manifest.json").read_text())
    prior = config.get("prior")
    shared = {
        "run": directory.name,
        "data": Path(config["data"]).name,
        "data_sha256": config["data_sha256"],
        "target": results["target"],
        "beta": float(config["beta"]),
        "prior": prior and Path(prior).name,
        "prior_seed": config.get("prior_seed"),
        "levels": config["settings"].get("prior", {}).get("levels"),
        "seed": config["seed"],
        "budget": config["settings"],
        "manifest": manifest,
    }
    return [{**shared, **row} for row in results["methods"].values()]


def tables(rows: Rows) -> str:
    """Markdown: a heading and a table for each data set, target and beta.

    InputError for runs of one table that have different priors or levels, and for a seed that is
    there twice.
    """
    groups: dict[tuple[str, str, float], dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        methods = groups[row["data"], row["target"], row["beta"]]
        for other in (one for found in methods.values() for one in found):
            check_alike(other, row)
        methods[row["method"]].append(row)
    parts = []
    for (data, target, beta), methods in groups.items():
        means = {
            f"{name}, {len(found)} seeds" if len(found) > 1 else name: mean_over_seeds(found)
            for name, found in methods.items()
        }
        parts.append(f"### {data}, {target}, beta {beta:g}\n\n{markdown(means)}")
    return "\n".join(parts)


def check_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """InputError for rows of one table that are no seeds of one thing."""
    for name in ALIKE:
        if one[name] != other[name]:
            raise InputError(
                f"{one['run']} and {other['run']} have one data set, target and beta, but {name}"
                f" {one[name]!r} and {other[name]!r}; make a table of each, with its own --out"
            )
    if (one["method"], one["seed"]) == (other["method"], other["seed"]):
        raise InputError(
            f"{one['run']} and {other['run']} both hold {one['method']!r} of seed {one['seed']};"
            " name one of them"
        )


def draw_samples(runs: Sequence[Path], out: Path) -> None:
    """One figure a data set and target: images of every method and the classes that it draws, of
    the first run that has it.
    """
    grids: dict[str, dict[str, Any]] = defaultdict(dict)
    shares: dict[str, dict[str, Any]] = defaultdict(dict)
    for directory in runs:
        for row in rows_of(directory):
            kept = directory / "rows" / f"{slug(row['method'])}.safetensors"
            name = slug(f"{Path(row['data']).stem} {row['target']} beta {row['beta']:g}")
            method = row["method"] + mark(row)
            if kept.exists() and method not in grids[name]:
                grids[name][method] = to_images(load(kept.read_bytes())["x0"])
                shares[name][method] = row["histogram"]
    for name, methods in grids.items():
        classes = [str(label) for label in range(len(next(iter(shares[name].values()))))]
        draw_figure(out / f"{name}.png", methods, shares[name], classes)


def main(settings: Settings) -> None:
    """Collect the runs."""
    if not settings.runs:
        raise InputError("no runs to make a table of; name finished ones with --runs")
    rows = [row for directory in settings.runs for row in rows_of(directory)]
    write_comparison(settings.out, rows, tables(rows))
    draw_samples(settings.runs, settings.out)
    for directory in settings.runs:
        if (directory / "posterior").exists():
            shutil.copy(directory / "figure.png", settings.out / f"{directory.name}.png")


if __name__ == "__main__":
    main(tyro.cli(Settings))
