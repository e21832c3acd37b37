"""Opening a job: all that a program will use is loaded and checked before anything is trained."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from rtb_rl.errors import InputError
from rtb_rl.rl.catalogue import D4RL_TASKS, OGBENCH, task_of_stem
from rtb_rl.rl.critics.critic import check_critic
from rtb_rl.rl.data.collect import collect
from rtb_rl.rl.data.dataset import TransitionDataset, check_spaces, data_facts
from rtb_rl.rl.data.ogbench_data import task_of_file
from rtb_rl.rl.data.readers import load_dataset
from rtb_rl.rl.data.summary import summarise
from rtb_rl.rl.episodes.environments import make_environment
from rtb_rl.rl.fitted import fitted_config
from rtb_rl.rl.jobs.budget import Budget, Tuning, budget_for, find_tuning
from rtb_rl.rl.jobs.job import Job
from rtb_rl.rl.jobs.run_critic import own_critic
from rtb_rl.rl.jobs.settings import JobSettings, tilt_of
from rtb_rl.rl.jobs.shared_stages import check_same, complete_stages, stage_configs
from rtb_rl.training.run import Run
from rtb_rl.training.stage import device_for_training

EMBEDDED = "hopper-medium-replay"
COLLECTED = "local/hopper/medium-replay-"
COLLECTED_ID = re.compile(r"local/(\w+)/([a-z-]+?)(?:-\d+)?-v\d+")
"""What `rtb-rl collect` calls the data of a recipe, and a run that collects them by itself."""


def open_job(
    settings: JobSettings,
    *,
    program: str,
    method: str,
    tuning_file: Path,
    own: Mapping[str, Any] | Callable[[Budget], Mapping[str, Any]] | None = None,
    uses: Sequence[str] = (),
) -> Job:
    """Load and check all that the program will use, before anything is trained or written.

    `own`: settings of the program beside the budget's, or what makes them of it; its run is tied
    to them as well. `uses`: which of prior and critic it fits or takes over. Raises InputError for
    data, environment, critic or directory that don't fit, and for a run to share of another prior
    or critic.
    """
    settings.check()
    tilt = tilt_of(settings)
    tuning = _tuning(settings, tuning_file)
    budget = budget_for(settings.budget, tuning)
    if tilt.beta is not None:
        budget = budget.with_beta(tilt.beta)
    if tilt.critic_steps is not None:
        budget = replace(budget, critic=replace(budget.critic, steps=tilt.critic_steps))
    given = own(budget) if callable(own) else own or {}
    dataset = _dataset(settings, budget)
    check_environment(dataset)
    source = _source(settings, budget)
    if settings.share is not None:
        check_shared(settings, dataset, source)
        used = [name for name in uses if name != "critic" or tilt.critic is None]
        _check_used(settings, dataset, budget, used)
    if tilt.critic is not None:
        _check_own_critic(tilt.critic, dataset)
    config = {
        **data_facts(dataset),
        "source": source,
        "program": program,
        "method": method,
        "seed": settings.seed,
        "budget": settings.budget,
        "critic": tilt.critic,
        "candidates": tilt.candidates,
        "ess": tilt.ess,
        "kl": tilt.kl,
        "settings": {**asdict(budget), **given},
    }
    run = Run(settings.out, config)
    Console().print(str(summarise(dataset)), highlight=False, soft_wrap=True)
    return Job(settings, tilt, dataset, budget, run)


def _check_own_critic(spec: str, dataset: TransitionDataset) -> None:
    """InputError for one that fails where training is or, unless it is moved, on the CPU, where
    policies act.
    """
    device = device_for_training()
    critic = own_critic(spec, dataset, device=device)
    places = [device] if isinstance(critic, nn.Module) else [device, torch.device("cpu")]
    for place in places:
        check_critic(critic, dataset.observation_size, dataset.action_size, device=place)


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
    if collected := COLLECTED_ID.fullmatch(settings.dataset):
        return f"{collected[1]}-{collected[2]}"
    stem = Path(settings.dataset).stem
    return task_of_stem(task_of_file(stem, settings.env_id))


def _source(settings: JobSettings, budget: Budget) -> str:
    return settings.dataset or f"{COLLECTED}{budget.collected_steps}-v0"


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


def check_shared(settings: JobSettings, dataset: TransitionDataset, source: str) -> None:
    """InputError where the run to share was fitted on other data than this data set, which was
    read from `source`.
    """
    share = settings.share
    assert share is not None
    here = "--dataset is" if settings.dataset else "the data without --dataset is"
    for told in (fitted_config(share / name) for name in complete_stages(share)):
        if told["dataset"] != dataset.name:
            raise InputError(
                f"--share {share} was trained on {told['dataset']} and {here} {dataset.name};"
                f" {_cure(settings, source)}share a run of the same data"
            )
        if told["data_sha256"] != dataset.sha256:
            raise InputError(
                f"--share {share} was trained on other data of the name {dataset.name} than"
                f" {here}; {_cure(settings, source)}share a run of the same data"
            )


def _check_used(
    settings: JobSettings, dataset: TransitionDataset, budget: Budget, used: Sequence[str]
) -> None:
    """InputError where the run to share has another prior or critic than would be fitted here."""
    configs = stage_configs(dataset, budget, seed=settings.seed)
    for name in used:
        check_same(settings.share, settings.out / name, configs[name])


def _cure(settings: JobSettings, source: str) -> str:
    """How to ask for the data of the run to share, where that can be told."""
    assert settings.share is not None
    path = settings.share / "config.json"
    told = fitted_config(settings.share) if path.exists() else {"source": source}
    if told["source"] == source:
        return ""
    if not told["source"].startswith(COLLECTED):
        return f"give --dataset {told['source']} or "
    other = told["budget"] != settings.budget
    wanted = ["leave --dataset out"] * (settings.dataset is not None)
    wanted += [f"{'with' if wanted else 'give'} --budget {told['budget']}"] * other
    return f"{' '.join(wanted)} or " if wanted else ""
