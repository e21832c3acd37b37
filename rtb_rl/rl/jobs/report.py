"""Evaluation of several methods side by side: a table, a figure, results.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from rtb_rl.rl.critics.critic import Critic
from rtb_rl.rl.data.dataset import TransitionDataset
from rtb_rl.rl.episodes.curve import Curve
from rtb_rl.rl.episodes.evaluation import Policy, evaluate
from rtb_rl.rl.episodes.scores import normalised_score
from rtb_rl.rl.posteriors.prior import ActionDiffusion
from rtb_rl.rl.posteriors.strength import warning_of
from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.diagnostics import trust
from rtb_rl.training.progress import progress
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for

COLOURS = {"prior": "#7f7f7f", "iql": "#ff7f0e", "best_of_n": "#2ca02c", "rtb": "#1f77b4"}


def evaluate_methods(
    run: Run,
    policies: Mapping[str, Policy],
    acting: Mapping[str, str],
    env_id: str,
    reference: tuple[float, float] | None,
    *,
    episodes: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Every method's episodes, on the same seeds; what was evaluated before is not run again.

    `acting`: for each method a digest of what acts, kept beside its episodes; those of another
    digest, or of none, are run anew.
    """
    results = {}
    for name, policy in policies.items():
        path = run.directory / f"{name}.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.pop("acting", None) != acting[name]:
            with progress(f"evaluate {name}", episodes) as show:
                done = 0

                def count(ended: int, show=show) -> None:
                    nonlocal done
                    done += ended
                    show(done, "")

                records = evaluate(policy, env_id, episodes=episodes, seed=seed, progress=count)
            kept = records.summary(reference)
            told = {"acting": acting[name], **kept}
            replace_file(path, json.dumps(told, indent=2).encode())
        results[name] = kept
    return results


def stage_results(directory: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of every stage of a run, and the diagnostics of what acts: a posterior of its own
    where there is one, else that of all strengths.
    """
    paths = sorted(directory.glob("*/results.json"))
    found = {path.parent.name: json.loads(path.read_text()) for path in paths}
    timings = {name: told["seconds"] for name, told in found.items() if "seconds" in told}
    told = [found[name] for name in ("posterior", "acting", "amortised") if name in found]
    diagnostics = [results["diagnostics"] for results in told if "diagnostics" in results]
    return timings, diagnostics[0] if diagnostics else {}


def print_table(dataset: TransitionDataset, methods: Mapping[str, dict[str, Any]]) -> None:
    """One row a method: mean return and normalised score with their 95 % intervals."""
    table = Table(title=f"{dataset.name}, evaluated in {dataset.env_id}", title_justify="left")
    table.add_column("method")
    for title in ("episodes", "mean return", "95 % interval", "normalised", "95 % interval"):
        table.add_column(title, justify="right")
    returns = dataset.episode_returns().numpy()
    mean = float(returns.mean()) if len(returns) else float("nan")
    score = (
        f"{normalised_score(mean, dataset.reference_returns):.1f}"
        if dataset.reference_returns
        else "-"
    )
    table.add_row("data set", str(len(returns)), f"{mean:.0f}", "", score, "", end_section=True)
    for name, row in methods.items():
        score = "-" if row["normalised_score"] is None else f"{row['normalised_score']:.1f}"
        table.add_row(
            name,
            str(len(row["returns"])),
            f"{row['mean_return']:.0f}",
            _interval(row["mean_return_interval"], 0),
            score,
            _interval(row["normalised_score_interval"], 1),
        )
    Console(width=100).print(table)


def print_diagnostics(diagnostics: Mapping[str, float]) -> None:
    """How far to trust a posterior; nothing where there is none."""
    if not diagnostics:
        return
    Console(width=100).print(f"posterior: {trust(diagnostics)}", highlight=False)
    if warning := warning_of(diagnostics.get("kl", 0.0)):
        Console(width=100, stderr=True).print(f"warning: {warning}", highlight=False)


def print_end(
    directory: Path, timings: Mapping[str, float], curve: Curve, trained: str | None
) -> None:
    """Where the results are, how long they took, and whether the curve is the one asked for."""
    lines = []
    if trained and len(curve.points) < curve.wanted:
        lines.append(
            f"learning curve: {len(curve.points)} of {curve.wanted} points: stage {trained} was"
            " fitted before, without it, or has fewer steps"
        )
    taken = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in timings.items())
    lines += [
        f"training time: {taken}",
        f"results: {directory / 'results.json'}, figure: {directory / 'figure.png'}",
        f"curves: tensorboard --logdir {directory}",
    ]
    Console().print("\n".join(lines), highlight=False, soft_wrap=True)


def _interval(bounds: Sequence[float] | None, digits: int) -> str:
    return "-" if bounds is None else f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}"


def draw_figure(
    path: Path,
    dataset: TransitionDataset,
    methods: Mapping[str, dict[str, Any]],
    states: Sequence["StatePanel"],
):
    """Episode returns of data set and methods, and for a few states the policy against its
    target.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 1 + len(states), figsize=(4 + 3.2 * len(states), 3.6))
    axes = np.atleast_1d(axes)
    groups = {"data set": dataset.episode_returns().numpy()}
    groups |= {name: np.asarray(row["returns"]) for name, row in methods.items()}
    for position, (name, returns) in enumerate(groups.items()):
        jitter = np.linspace(-0.18, 0.18, len(returns))
        size = 14 if len(returns) < 100 else 3
        axes[0].scatter(
            position + jitter, returns, s=size, alpha=0.6, color=COLOURS.get(name, "black")
        )
        axes[0].hlines(returns.mean(), position - 0.3, position + 0.3, color="black", lw=1.5)
    axes[0].set_xticks(range(len(groups)), list(groups), rotation=20)
    axes[0].set_ylabel("episode return")
    axes[0].set_title(dataset.name, fontsize=9)
    for axis, panel in zip(axes[1:], states, strict=True):
        panel.draw(axis)
    if len(states):
        axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    return figure


def state_panels(
    dataset: TransitionDataset,
    prior: ActionDiffusion,
    posterior: ActionDiffusion,
    critic: Critic,
    beta: float,
    *,
    seed: int,
    count: int = 3,
    draws: int = 2000,
) -> list["StatePanel"]:
    """Draws of prior and posterior at a few states of the data."""
    generator = generator_for(seed, "panels", device=prior.device)
    observations = dataset.to(prior.device).sample(count, generator=generator).observations
    actions = prior.sampler.sample(observations, draws, generator=generator).clamp(-1, 1)
    tilted = posterior.sampler.sample(observations, draws, generator=generator).clamp(-1, 1)
    each = observations.repeat_interleave(draws, dim=0)
    with torch.no_grad():
        q = critic.q(each, actions.flatten(0, 1)).reshape(count, draws)
    return [
        StatePanel(
            f"state {i + 1}", actions[i, :, 0].cpu(), tilted[i, :, 0].cpu(), beta * q[i].cpu()
        )
        for i in range(count)
    ]


class StatePanel:
    """One state: first action coordinate of prior and posterior draws, and the target.

    The target density is the prior draws weighted by exp(beta (log r - max)).
    """

    def __init__(
        self, title: str, prior: torch.Tensor, posterior: torch.Tensor, log_weight: torch.Tensor
    ):
        self.title = title
        self.prior, self.posterior = prior.numpy(), posterior.numpy()
        self.target_weights = (log_weight - log_weight.max()).exp().numpy()

    def draw(self, axis) -> None:
        bins = np.linspace(-1, 1, 41)
        axis.hist(self.prior, bins, density=True, color="#bbbbbb", label="prior")
        axis.hist(
            self.prior,
            bins,
            weights=self.target_weights,
            density=True,
            histtype="step",
            color="black",
            label="prior x exp(beta Q)",
        )
        axis.hist(
            self.posterior,
            bins,
            density=True,
            histtype="step",
            color=COLOURS["rtb"],
            lw=2,
            label="RTB",
        )
        axis.set_xlabel("action, first coordinate")
        axis.set_title(self.title, fontsize=9)
        axis.set_yticks([])
