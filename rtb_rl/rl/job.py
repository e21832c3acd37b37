"""What every offline-RL program begins and ends with: data, run, critic; table, figure, results."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rtb_rl.errors import InputError
from rtb_rl.rl.budget import Budget, BudgetName, budget_for, read_tuning
from rtb_rl.rl.collect import collect
from rtb_rl.rl.critic import Critic, check_critic, load_critic
from rtb_rl.rl.critic_training import fit_critic, scaled_for_critic
from rtb_rl.rl.dataset import TransitionDataset, check_spaces, data_facts
from rtb_rl.rl.environments import make_environment
from rtb_rl.rl.readers import load_dataset
from rtb_rl.rl.report import StatePanel, draw_figure, evaluate_methods, print_table
from rtb_rl.rl.saved import load_policy
from rtb_rl.rl.summary import summarise
from rtb_rl.training.diagnostics import trust
from rtb_rl.training.run import Run

EMBEDDED = "hopper-medium-replay"


@dataclass(frozen=True)
class JobSettings:
    """What all offline-RL programs ask for."""

    dataset: str | None = None
    """D4RL task, Minari id, or .hdf5 / .npz file; not given: made with the behaviour policies that
    come with the package."""
    env_id: str | None = None
    """Gymnasium environment to evaluate in; found from the data set where it says so."""
    out: Path = Path("runs/latest")
    """Directory of the run; the same command continues what it finds there."""
    seed: int = 0
    budget: BudgetName = "full"
    """smoke: every stage in seconds; demo: minutes; full: about 20 minutes on two cores."""
    critic: str | None = None
    """package.module:factory of a critic of your own, instead of IQL's."""
    share: Path | None = None
    """Run whose prior and critic, fitted with the same settings, are taken over."""
    beta: float | None = None
    """Strength of the critic; not given: as tuned for the data set."""
    candidates: int = 16
    """Actions among which best_of_n lets the critic choose."""
    clip_actions: bool = False
    """Clip recorded actions outside the environment's box instead of refusing them."""


@dataclass(frozen=True)
class Job:
    """An open run with its data and budget."""

    settings: JobSettings
    dataset: TransitionDataset
    budget: Budget
    run: Run

    @property
    def out(self) -> Path:
        return self.run.directory

    @property
    def env_id(self) -> str:
        assert self.dataset.env_id is not None
        return self.dataset.env_id

    def critic(self) -> Critic:
        """The user's critic, checked, or IQL's, fitted."""
        spec = self.settings.critic
        if spec is None:
            budget = self.budget.critic
            Console().print(
                f"critic: {scaled_for_critic(self.dataset, budget)[1]}", highlight=False
            )
            return fit_critic(self.out / "critic", self.dataset, budget, seed=self.settings.seed)
        return load_critic(spec, self.dataset)

    def finish(
        self,
        methods: Sequence[str],
        *,
        critic: Critic | None = None,
        panels: Sequence[StatePanel] = (),
    ) -> None:
        """Evaluate the methods, print the table, draw the figure and write results.json."""
        dataset = self.dataset
        stage = self.run.stage("evaluation", {**self.run.config, "methods": list(methods)})
        policies = {name: load_policy(self.out, name, critic=critic) for name in methods}
        rows = evaluate_methods(
            stage,
            policies,
            self.env_id,
            dataset.reference_returns,
            episodes=self.budget.episodes,
            seed=self.settings.seed,
        )
        timings, diagnostics = self._stage_results()
        print_table(dataset, rows)
        if diagnostics:
            Console(width=100).print(f"posterior: {trust(diagnostics)}", highlight=False)
        figure = draw_figure(self.out / "figure.png", dataset, rows, panels)
        self.run.log_figure(0, "evaluation", figure)
        self.run.finish(
            {
                "methods": rows,
                "diagnostics": diagnostics,
                "timings": timings,
                "dataset": {**data_facts(dataset), "summary": asdict(summarise(dataset))},
                "versions": self._manifest()["versions"],
                "manifest": self._manifest(),
            }
        )
        taken = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in timings.items())
        Console().print(
            f"training time: {taken}\nresults: {self.out / 'results.json'}, figure:"
            f" {self.out / 'figure.png'}\ncurves: tensorboard --logdir {self.out}",
            highlight=False,
            soft_wrap=True,
        )

    def _stage_results(self) -> tuple[dict[str, float], dict[str, float]]:
        timings, diagnostics = {}, {}
        for name in ("prior", "critic", "iql", "posterior"):
            if (self.out / name / "config.json").exists():
                results = _read_json(self.out / name / "results.json")
                timings[name] = results["seconds"]
                diagnostics |= results.get("diagnostics", {})
        return timings, diagnostics

    def _manifest(self) -> dict[str, Any]:
        return _read_json(self.out / "manifest.json")


def open_job(settings: JobSettings, *, program: str, method: str, tuning_file: Path) -> Job:
    """Load and check all that the program will use, before anything is trained or written.

    Raises InputError for data, environment, critic or directory that don't fit.
    """
    tuning = read_tuning(tuning_file, _tuning_key(settings))
    budget = budget_for(settings.budget, tuning)
    if settings.beta is not None:
        budget = budget.with_beta(settings.beta)
    dataset = _dataset(settings, budget)
    _check_environment(dataset)
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
        "settings": asdict(budget),
    }
    run = Run(settings.out, config)
    if settings.share is not None:
        _take_over(settings.share, run.directory)
    return Job(settings, dataset, budget, run)


def _tuning_key(settings: JobSettings) -> str:
    return EMBEDDED if settings.dataset is None else Path(settings.dataset).stem


def _source(settings: JobSettings, budget: Budget) -> str:
    return settings.dataset or f"local/hopper/medium-replay-{budget.collected_steps}-v0"


def _dataset(settings: JobSettings, budget: Budget) -> TransitionDataset:
    source = _source(settings, budget)
    if settings.dataset is None:
        collect(EMBEDDED, steps=budget.collected_steps, seed=0, dataset_id=source)
    return load_dataset(source, env_id=settings.env_id, clip_actions=settings.clip_actions)


def _check_environment(dataset: TransitionDataset) -> None:
    if dataset.env_id is None:
        raise InputError(
            f"data set {dataset.name!r} doesn't say which environment it was recorded in; give it "
            f"with"
            " --env-id, such as --env-id Hopper-v5"
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


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
