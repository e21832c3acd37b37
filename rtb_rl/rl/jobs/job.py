"""What every offline-RL program begins and ends with: data, run, stages; table, figure, results."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from rtb_rl.rl.critics.critic import Critic, load_critic
from rtb_rl.rl.critics.gaussian_policy import GaussianPolicy
from rtb_rl.rl.critics.training import fit_critic, fit_gaussian_policy, scaled_for_critic
from rtb_rl.rl.data.dataset import TransitionDataset, data_facts
from rtb_rl.rl.data.summary import summarise
from rtb_rl.rl.episodes.curve import Curve
from rtb_rl.rl.jobs.budget import Budget, BudgetName
from rtb_rl.rl.jobs.report import StatePanel, draw_figure, evaluate_methods, print_table
from rtb_rl.rl.jobs.saved import load_policy
from rtb_rl.rl.jobs.shared_stages import SharedStages
from rtb_rl.rl.posteriors.posterior import PosteriorSettings, fit_posterior
from rtb_rl.rl.posteriors.prior import ActionDiffusion, fit_prior
from rtb_rl.rl.posteriors.strength import beta_for_ess
from rtb_rl.training.diagnostics import trust
from rtb_rl.training.memory import peak_of_this_process
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import fingerprint

T = TypeVar("T")


@dataclass(frozen=True)
class JobSettings:
    """What all offline-RL programs ask for."""

    dataset: str | None = None
    """D4RL task, ogbench: and a single task, Minari id, or .hdf5 / .npz file; not given: made with
    the behaviour policies that come with the package."""
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
    stages: Path | None = None
    """Directory of stages that several runs share: each is fitted once, by the first to need it."""
    curve: int = 0
    """How many times the policy is evaluated while it is trained, 5 episodes each."""
    beta: float | None = None
    """Strength of the critic; not given: as tuned for the data set."""
    ess: float | None = None
    """Instead of a beta: the largest at which draws of the prior, weighted by exp(beta Q), keep
    this effective sample size, a share between 0 and 1. Needs no episode and no training."""
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
    begun: float = field(default_factory=time.monotonic)

    @property
    def out(self) -> Path:
        return self.run.directory

    @property
    def env_id(self) -> str:
        assert self.dataset.env_id is not None
        return self.dataset.env_id

    def curve(self, stage: Path) -> Curve:
        """Evaluates the policy of the stage in this directory while it is trained."""
        points, seed = self.settings.curve, self.settings.seed
        return Curve(stage / "curve.json", self.env_id, points=points, seed=seed)

    def stage(self, name: str, facts: Mapping[str, Any], fit: Callable[[Path], T]) -> T:
        """What `fit` makes in a directory of this name, taken from the stages that runs share.

        `facts`: all that makes it another stage, beside the data and the seed.
        """
        shared = SharedStages(self.settings.stages, self.dataset)
        return shared.stage(self.out / name, {**facts, "seed": self.settings.seed}, fit)

    def prior(self) -> ActionDiffusion:
        """The behaviour prior, fitted."""
        budget, seed = self.budget.prior, self.settings.seed
        return self.stage(
            "prior",
            {"prior": asdict(budget)},
            lambda directory: fit_prior(directory, self.dataset, budget, seed=seed),
        )

    def critic(self) -> Critic:
        """The user's critic, checked, or IQL's, fitted."""
        spec, budget, seed = self.settings.critic, self.budget.critic, self.settings.seed
        if spec is not None:
            return load_critic(spec, self.dataset)
        Console().print(f"critic: {scaled_for_critic(self.dataset, budget)[1]}", highlight=False)
        return self.stage(
            "critic",
            {"critic": asdict(budget)},
            lambda directory: fit_critic(directory, self.dataset, budget, seed=seed),
        )

    def gaussian_policy(self, critic: Critic) -> GaussianPolicy:
        """IQL's own policy from this critic, fitted."""
        budget, seed = self.budget.gaussian, self.settings.seed
        return self.stage(
            "iql",
            {"gaussian": asdict(budget), "critic": fingerprint(critic)},
            lambda directory: fit_gaussian_policy(
                directory, self.dataset, critic, budget, seed=seed, watch=self.curve(directory)
            ),
        )

    def posterior_settings(self, prior: ActionDiffusion, critic: Critic) -> PosteriorSettings:
        """Those of the budget, with the beta that `ess` asks for."""
        share, seed = self.settings.ess, self.settings.seed
        if share is None:
            return self.budget.posterior
        generator = generator_for(seed, "beta", device=prior.device)
        beta = beta_for_ess(prior, critic, self.dataset, share, generator=generator)
        Console().print(f"beta {beta:.4g}: prior draws keep an ESS of {share}", highlight=False)
        return self.budget.with_beta(beta).posterior

    def posterior(
        self, prior: ActionDiffusion, critic: Critic, settings: PosteriorSettings
    ) -> ActionDiffusion:
        """The posterior of this prior and critic, fitted."""
        made_of = fingerprint(prior), fingerprint(critic)
        return self.stage(
            "posterior",
            {"posterior": asdict(settings), "made_of": made_of},
            lambda directory: fit_posterior(
                directory,
                self.dataset,
                prior,
                critic,
                settings,
                seed=self.settings.seed,
                watch=self.curve(directory),
            ),
        )

    def finish(
        self,
        methods: Sequence[str],
        *,
        trained: str | None = None,
        critic: Critic | None = None,
        panels: Sequence[StatePanel] = (),
    ) -> None:
        """Evaluate the methods, print the table, draw the figure and write results.json.

        `trained` is the stage that made the program's own policy, whose learning curve is kept.
        """
        dataset, curve = self.dataset, self.curve(self.out / (trained or ""))
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
                "curve": curve.points,
                "best": curve.best,
                "wall_seconds": time.monotonic() - self.begun,
                "peak_memory_bytes": peak_of_this_process(),
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
        for path in sorted(self.out.glob("*/results.json")):
            results = _read_json(path)
            if "seconds" in results:
                timings[path.parent.name] = results["seconds"]
                diagnostics |= results.get("diagnostics", {})
        return timings, diagnostics

    def _manifest(self) -> dict[str, Any]:
        return _read_json(self.out / "manifest.json")


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
