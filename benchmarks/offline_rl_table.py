"""Table and figure of finished runs of the main job: one row a run and method, raw rows beside it.

    rtb-rl bench offline_rl_table --runs runs/hopper-0 runs/hopper-1 --out
    benchmarks/results/offline_rl

Writes rows.jsonl (every episode of every run), table.md and figure.png.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro

from rtb_rl.errors import InputError
from rtb_rl.training import write_comparison

METHODS = ("prior", "iql", "best_of_n", "rtb")
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Settings:
    """Table and figure of finished runs of the main job."""

    runs: tuple[Path, ...] = field(default_factory=tuple)
    """Directories of finished runs."""
    out: Path = Path("benchmarks/results/offline_rl")
    fast: bool = False
    """Without effect: nothing is trained here."""


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """One row a method of a finished run."""
    path = directory / "results.json"
    if not path.exists():
        raise InputError(f"{directory} has no results.json; finish that run first")
    results = json.loads(path.read_text())
    summary = results["dataset"]["summary"]
    path = directory / "posterior" / "config.json"
    if not path.exists():
        raise InputError(f"{directory} has no posterior of its own; give runs of rtb_iql")
    if results["dataset"]["reference_returns"] is None:
        raise InputError(
            f"{directory} is of {results['dataset']['dataset']}, which has no reference returns to"
            " score by; give runs of data that have them"
        )
    posterior = json.loads(path.read_text())["posterior"]
    shared = {
        "dataset": results["dataset"]["dataset"],
        "data_sha256": results["dataset"]["data_sha256"],
        "data_normalised": summary["normalised"],
        "env_id": results["dataset"]["env_id"],
        "reference_returns": results["dataset"]["reference_returns"],
        "seed": results["manifest"]["seed"],
        "beta": posterior["finetune"]["beta"],
        "commit": results["manifest"]["commit"],
        "versions": results["versions"],
        "timings": results["timings"],
        "diagnostics": results["diagnostics"],
    }
    return [
        {"case": f"{shared['dataset']}/{method}", "method": method, **shared, **row}
        for method, row in results["methods"].items()
    ]


def table(rows: Rows) -> str:
    """Markdown: normalised scores by data set and method, with intervals over all episodes."""
    by_case = _grouped(rows)
    head = ["data, beta", "seeds", "data mean", *METHODS, "ESS", "log Z - ELBO"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for dataset, methods in by_case.items():
        posterior = methods["rtb"]
        seeds = sorted(row["seed"] for row in posterior)
        cells = [dataset, str(len(seeds)), f"{posterior[0]['data_normalised']:.1f}"]
        cells += [_cell(methods[method]) if method in methods else "-" for method in METHODS]
        ess = np.mean([row["diagnostics"]["ess"] for row in posterior])
        gap = np.mean([r["diagnostics"]["log_z"] - r["diagnostics"]["elbo"] for r in posterior])
        lines.append("| " + " | ".join([*cells, f"{ess:.2f}", f"{gap:.2f}"]) + " |")
    return "\n".join(lines) + "\n"


def _cell(rows: Rows) -> str:
    scores = np.concatenate([_scores(row) for row in rows])
    random = np.random.default_rng(0)
    means = random.choice(scores, (10_000, len(scores))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{scores.mean():.1f} ({low:.1f} to {high:.1f})"


def _scores(row: Mapping[str, Any]) -> np.ndarray:
    """Normalised scores of a row's episodes."""
    returns = np.asarray(row["returns"])
    low, high = row["reference_returns"]
    return 100 * (returns - low) / (high - low)


def _grouped(rows: Rows) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    grouped: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        grouped[f"{row['dataset']}, {row['beta']:g}"][row["method"]].append(row)
    return {dataset: dict(methods) for dataset, methods in sorted(grouped.items())}


def draw(rows: Rows, path: Path) -> None:
    """Every episode's normalised score, by data set and method; a bar at each mean."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_case = _grouped(rows)
    figure, axes = pyplot.subplots(
        1, len(by_case), figsize=(3.4 * len(by_case), 3.4), squeeze=False
    )
    for axis, (dataset, methods) in zip(axes[0], by_case.items(), strict=True):
        for position, method in enumerate(m for m in METHODS if m in methods):
            scores = np.concatenate([_scores(row) for row in methods[method]])
            spread = np.linspace(-0.2, 0.2, len(scores))
            axis.scatter(position + spread, scores, s=10, alpha=0.5)
            axis.hlines(scores.mean(), position - 0.3, position + 0.3, color="black")
        mean = methods["rtb"][0]["data_normalised"]
        axis.axhline(mean, color="grey", ls=":", lw=1, label="data mean")
        axis.set_xticks(range(len(METHODS)), METHODS, rotation=25)
        axis.set_title(dataset, fontsize=9)
    axes[0][0].set_ylabel("normalised score of an episode")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(settings: Settings) -> None:
    """Read the runs; write rows, table and figure."""
    if not settings.runs:
        raise InputError("no runs given; name the --out directories of finished runs with --runs")
    rows = [row for directory in settings.runs for row in rows_of(directory)]
    write_comparison(settings.out, rows, table(rows))
    draw(rows, settings.out / "figure.png")


if __name__ == "__main__":
    main(tyro.cli(Settings))
