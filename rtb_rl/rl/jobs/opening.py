"""Opening a job: all that a program will use is loaded and checked before anything is trained."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from rtb_rl.errors import InputError
from rtb_rl.rl.catalogue import D4RL_TASKS, OGBENCH, task_of_stem
from rtb_rl.rl.critics.critic import check_critic, load_critic
from rtb_rl.rl.data.collect import collect
from rtb_rl.rl.data.dataset import TransitionDataset, check_spaces, data_facts
from rtb_rl.rl.data.ogbench_data import task_of_file
from rtb_rl.rl.data.readers import load_dataset
from rtb_rl.rl.data.summary import summarise
from rtb_rl.rl.episodes.environments import make_environment
from rtb_rl.rl.jobs.budget import Budget, Tuning, budget_for, find_tuning
from rtb_rl.rl.jobs.job import Job, JobSettings
from rtb_rl.rl.posteriors.strength import check_share
from rtb_rl.training.run import Run

EMBEDDED = "hopper-medium-replay"


def open_job(
    settings: JobSettings,
    *,
    program: str,
    method: str,
    tuning_file: Path,
    own: Mapping[str, Any] | None = None,
) -> Job:
    """Load and check all that the program will use, before anything is trained or written.

    `own`: settings of the program beside the budget's, which its run is tied to as well. Raises
    InputError for data, environment, critic or directory that don't fit.
    """
    tuning = _tuning(settings, tuning_file)
    budget = budget_for(settings.budget, tuning)
    if settings.beta is not None:
        budget = budget.with_beta(settings.beta)
    if settings.ess is not None:
        check_share(settings.ess, settings.beta)
    dataset = _dataset(settings, budget)
    check_environment(dataset)
    if settings.critic is not None:
        critic = load_critic(settings.critic, dataset)
        check_critic(critic, dataset.observation_size, dataset.action_size)
    Console().print(str(summarise(dataset)), highlight=False, soft_wrap=True)
    config = {
        **data_facts(dataset),
        "source": _source(settings, budget),
        "program": program,
        "method": method,
        "seed": settings.seed,
        "budget": settings.budget,
        "critic": settings.critic,
        "candidates": settings.candidates,
        "ess": settings.ess,
        "settings": {**asdict(budget), **(own or {})},
    }
    run = Run(settings.out, config)
    if settings.share is not None:
        _take_over(settings.share, run.directory)
    return Job(settings, dataset, budget, run)


def _tuning(settings: JobSettings, path: Path) -> Tuning:
    """What the file sets for the data set; says so where a task of a catalogue has no table."""
    key = _tuning_key(settings)
    table, tuning = find_tuning(path, key)
    if table == "default" and (key in D4RL_TASKS or key.startswith(OGBENCH)):
        Console().print(
            f"settings: {path.name} has no table for {key}, so its [default]: beta"
            f" {tuning.beta:g}, expectile {tuning.expectile:g}, discount {tuning.discount:g}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return tuning


def _tuning_key(settings: JobSettings) -> str:
    if settings.dataset is None:
        return EMBEDDED
    stem = Path(settings.dataset).stem
    return task_of_stem(task_of_file(stem, settings.env_id))


def _source(settings: JobSettings, budget: Budget) -> str:
    return settings.dataset or f"local/hopper/medium-replay-{budget.collected_steps}-v0"


def _dataset(settings: JobSettings, budget: Budget) -> TransitionDataset:
    source = _source(settings, budget)
    if settings.dataset is None:
        collect(EMBEDDED, steps=budget.collected_steps, seed=0, dataset_id=source)
    return load_dataset(source, env_id=settings.env_id, clip_actions=settings.clip_actions)


def check_environment(dataset: TransitionDataset) -> None:
    """InputError for data without an environment, or of other spaces than it has."""
    if dataset.env_id is None:
        raise InputError(
            f"data set {dataset.name!r} doesn't say which environment it was recorded in; give it"
            " with --env-id, such as --env-id Hopper-v5 (env_id in a grid)"
        )
    env = make_environment(dataset.env_id)
    try:
        check_spaces(dataset, env.observation_space, env.action_space)
    finally:
        env.close()


def _take_over(source: Path, out: Path) -> None:
    """Copy the complete stages of another run; their configuration is checked on use."""
    found = [
        name for name in ("prior", "critic", "iql") if (source / name / "results.json").exists()
    ]
    if not found:
        raise InputError(f"{source} holds no complete prior, critic or iql; give another --share")
    for name in found:
        if not (out / name).exists():
            shutil.copytree(source / name, out / name)
