"""What methods make of one critic: return, value and divergence from the behaviour prior.

    rtb-rl bench extraction --runs runs/hopper runs/hopper-qgpo --out runs/extraction

Runs of one data set and one critic (rtb_iql, qgpo with --critic-kind iql, rtb_best_of_n, ...) are
compared by draws in the same states. Writes rows.jsonl and table.md; episodes are those that the
runs were evaluated with.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from rtb_rl.errors import InputError
from rtb_rl.rl import draws_of, load_policy, measure_extraction
from rtb_rl.rl.critics.identity import critic_fingerprint
from rtb_rl.rl.jobs.run_critic import load_run_critic, load_run_dataset
from rtb_rl.training import generator_for, write_comparison


@dataclass(frozen=True)
class Settings:
    """Extraction with the critic held fixed."""

    runs: tuple[Path, ...] = ()
    """Directories of finished runs of one critic."""
    out: Path = Path("runs/extraction")
    states: int = 64
    """Of the data, in which actions are drawn."""
    draws: int = 1000
    """In each state."""
    seed: int = 0
    fast: bool = False
    """A few states and draws: to see it work."""


def rows_of(run: Path, settings: Settings) -> list[dict[str, Any]]:
    """One row for each method of a finished run."""
    results = json.loads(_finished(run).read_text())
    config = json.loads((run / "config.json").read_text())
    critic = load_run_critic(run)
    dataset = load_run_dataset(config)
    generator = generator_for(settings.seed, "states")
    states = 4 if settings.fast else settings.states
    observations = dataset.sample(states, generator=generator).observations
    prior = draws_of(load_policy(run, "prior").policy)
    rows = []
    for method, evaluated in results["methods"].items():
        measured = measure_extraction(
            draws_of(load_policy(run, method).policy),
            prior,
            critic,
            observations,
            draws=50 if settings.fast else settings.draws,
            generator=generator_for(settings.seed, "draws"),
        )
        ess = results["diagnostics"].get("ess") if method == "rtb" else None
        kept = {key: evaluated[key] for key in ("returns", "normalised_score")}
        rows.append(
            {
                "run": run.name,
                "dataset": config["dataset"],
                "data_sha256": config["data_sha256"],
                "critic": critic_fingerprint(critic, dataset),
                "seed": config["seed"],
                "method": method,
                **kept,
                **asdict(measured),
                "ess": ess,
                "path_kl": results["diagnostics"].get("kl") if method == "rtb" else None,
                "versions": results["versions"],
            }
        )
    return rows


def check_one_critic(runs: Sequence[Path]) -> None:
    """InputError for runs that are not finished, and for several data sets or critics."""
    data: dict[str, str] = {}
    critics: dict[str, str] = {}
    for run in runs:
        _finished(run)
        config = json.loads((run / "config.json").read_text())
        data[config["data_sha256"]] = str(run)
        told = critic_fingerprint(load_run_critic(run), load_run_dataset(config))
        critics[told] = str(run)
    for found, words in ((data, "data sets"), (critics, "critics")):
        if len(found) > 1:
            raise InputError(
                f"the runs are of {len(found)} {words}: {', '.join(found.values())}; give runs that"
                " share it, such as those made with the same --stages and seed"
            )


def each_method_once(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without policies that an earlier run holds too: of one method and, by the same
    draws, with the same values.
    """
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        first.setdefault((row["method"], row["advantage"], row["kl"]), row)
    return list(first.values())


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a method, and a run where several have one of it."""
    methods = [row["method"] for row in rows]
    lines = [
        f"{rows[0]['dataset']}, seed {rows[0]['seed']}, one critic.",
        "",
        "| method | normalised score | E[Q - V] | KL to the prior | path KL | ESS |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        score = row["normalised_score"]
        numbers = [
            "-" if score is None else f"{score:.1f}",
            f"{row['advantage']:.3f} ± {row['advantage_error']:.3f}",
            f"{row['kl']:.2f} ± {row['kl_error']:.2f}",
            "-" if row["path_kl"] is None else f"{row['path_kl']:.2f}",
            "-" if row["ess"] is None else f"{row['ess']:.2f}",
        ]
        several = methods.count(row["method"]) > 1
        name = f"{row['method']}, {row['run']}" if several else row["method"]
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def _finished(run: Path) -> Path:
    path = run / "results.json"
    if not path.exists():
        raise InputError(f"{run} is no finished run (no results.json); give its --out directory")
    return path


def main(settings: Settings) -> None:
    """Measure every method of the runs; write rows and table."""
    if not settings.runs:
        raise InputError("no runs given; name the --out directories of finished runs with --runs")
    for name in ("states", "draws"):
        if getattr(settings, name) < 2:
            raise InputError(f"--{name} is {getattr(settings, name)}; give at least 2")
    check_one_critic(settings.runs)
    rows = each_method_once([row for run in settings.runs for row in rows_of(run, settings)])
    write_comparison(settings.out, rows, table(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
