"""One regression on other actions: does the source of a policy's actions matter, or its network?

    rtb-rl bench regressions --run runs/hopper --out runs/regressions

IQL's policy, a Gaussian regressed on actions and evaluated by its mean, is fitted to the actions of
the data, of the behaviour prior and of the posterior, in the same states: with one critic, network
and number of steps, the rows differ by the actions alone. The run is a finished one of rtb_iql.
Writes rows.jsonl and table.md; the same command goes on with what is there.
"""

import json
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import tyro

from rtb_rl.errors import InputError
from rtb_rl.rl import (
    GaussianPolicy,
    GaussianSettings,
    MeanActionPolicy,
    TransitionDataset,
    fit_gaussian_policy,
)
from rtb_rl.rl.critics.critic import ValueCritic
from rtb_rl.rl.data.dataset import data_facts
from rtb_rl.rl.jobs.report import evaluate_methods
from rtb_rl.rl.jobs.run_critic import load_run_critic, load_run_dataset
from rtb_rl.rl.jobs.saved import load_posterior, load_prior
from rtb_rl.rl.posteriors.prior_actions import draw_prior_actions
from rtb_rl.training import Run, generator_for, write_comparison
from rtb_rl.training.stage import fingerprint

Source = Literal["data-weighted", "data", "prior-weighted", "prior", "rtb"]
STATES = 4096  # in which the mean action is valued


@dataclass(frozen=True)
class Settings:
    """IQL's regression on the actions of data, prior and posterior."""

    run: Path | None = None
    """Directory of a finished run of rtb_iql."""
    out: Path = Path("runs/regressions")
    sources: tuple[Source, ...] = get_args(Source)
    """Whose actions; weighted: by exp(temperature (Q - V)), as IQL weighs those of the data."""
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    """Of each regression; not given: as many as the run's own policy had."""
    episodes: int = 20
    fast: bool = False
    """Some hundred steps and two episodes: to see it work."""


@dataclass(frozen=True)
class Setting:
    """What all regressions share."""

    run: Path
    config: dict[str, Any]
    dataset: TransitionDataset
    critic: ValueCritic
    gaussian: GaussianSettings


def open_run(settings: Settings) -> Setting:
    """InputError for a run that is not given, not finished or not of rtb_iql, and for no steps,
    episodes, seeds or sources.
    """
    for name in ("steps", "episodes"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise InputError(f"--{name} is {value}; give at least 1")
    for name in ("seeds", "sources"):
        if not getattr(settings, name):
            raise InputError(f"--{name} is empty; name at least one")
    if settings.run is None or not (settings.run / "results.json").exists():
        raise InputError(
            f"--run {settings.run} is no finished run (no results.json); give the --out directory"
            " of one of rtb_iql"
        )
    config = json.loads((settings.run / "config.json").read_text())
    if not (settings.run / "posterior").exists() or not (settings.run / "iql").exists():
        raise InputError(
            f"--run {settings.run} is of {config['program']} and has no posterior and policy of"
            " IQL's; give one of rtb_iql"
        )
    gaussian = GaussianSettings(**config["settings"]["gaussian"])
    steps = gaussian.steps if settings.steps is None else settings.steps
    steps = 300 if settings.fast else steps
    given = (
        settings.run,
        config,
        load_run_dataset(config),
        cast(ValueCritic, load_run_critic(settings.run)),
    )
    return Setting(*given, replace(gaussian, steps=steps))


def row_of(given: Setting, source: Source, seed: int, settings: Settings) -> dict[str, Any]:
    """Draw the actions, regress, evaluate; each is skipped when it was done."""
    dataset = with_actions_of(given, source, settings.out)
    weighted = source.endswith("weighted")
    chosen = replace(given.gaussian, temperature=given.gaussian.temperature if weighted else 0.0)
    name = f"{source}-{seed}"
    policy = fit_gaussian_policy(settings.out / name, dataset, given.critic, chosen, seed=seed)
    count = 2 if settings.fast else settings.episodes
    facts = {**data_facts(dataset), "seed": seed, "episodes": count}
    run = Run(settings.out / name / "evaluation", facts)
    episodes = evaluate_methods(
        run,
        {"mean action": MeanActionPolicy(policy)},
        {"mean action": fingerprint(policy)},
        given.config["env_id"],
        dataset.reference_returns,
        episodes=count,
        seed=0,
    )["mean action"]
    kept = {key: episodes[key] for key in ("returns", "mean_return", "normalised_score")}
    return {
        "dataset": given.config["dataset"],
        "data_sha256": given.dataset.sha256,
        "run_seed": given.config["seed"],
        "source": source,
        "seed": seed,
        "gaussian": asdict(chosen),
        **kept,
        "advantage": mean_advantage(given, policy),
        "versions": json.loads((run.directory / "manifest.json").read_text())["versions"],
    }


def with_actions_of(given: Setting, source: Source, out: Path) -> TransitionDataset:
    """The data set, with one draw of the source in each state in place of its action."""
    whose = source.split("-")[0]
    if whose == "data":
        return given.dataset
    policy = load_prior(given.run / "prior") if whose == "prior" else load_posterior(given.run)
    place = out / f"actions-{whose}"
    drawn = draw_prior_actions(place, given.dataset, policy, candidates=1).actions
    actions = drawn[: len(given.dataset), 0].clamp(-1, 1).cpu()
    marked = f"{given.dataset.sha256} with actions of {whose}"
    return replace(given.dataset, actions=actions, sha256=marked)


@torch.no_grad()
def mean_advantage(given: Setting, policy: GaussianPolicy) -> float:
    """E[Q - V] of the mean action in states of the data."""
    generator = generator_for(0, "states")
    observations = given.dataset.sample(STATES, generator=generator).observations
    value = given.critic.v(observations)
    return float((given.critic.q(observations, policy.mean(observations)) - value).mean())


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a source, its seeds side by side."""
    score = "mean_return" if rows[0]["normalised_score"] is None else "normalised_score"
    lines = [
        f"{rows[0]['dataset']}, one critic; regressions of {rows[0]['gaussian']['steps']:,} steps,"
        f" mean action, {score.replace('_', ' ')} of each seed.",
        "",
        "| actions of | scores | mean | E[Q - V] |",
        "| --- | --- | --- | --- |",
    ]
    for source in dict.fromkeys(row["source"] for row in rows):
        own = [row for row in rows if row["source"] == source]
        scores = [row[score] for row in own]
        value = statistics.mean(row["advantage"] for row in own)
        told = ", ".join(f"{score:.1f}" for score in scores)
        lines.append(f"| {source} | {told} | {statistics.mean(scores):.1f} | {value:.2f} |")
    return "\n".join(lines) + "\n"


def main(settings: Settings) -> None:
    """Regress and evaluate what is not there yet; write rows and table."""
    given = open_run(settings)
    rows = [
        row_of(given, source, seed, settings)
        for seed in settings.seeds
        for source in settings.sources
    ]
    write_comparison(settings.out, rows, table(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
