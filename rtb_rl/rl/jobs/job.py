"""What every offline-RL program begins and ends with: data, run, stages; table, figure, results."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from rtb_rl.nn.correction import ScaledCorrection
from rtb_rl.rl.critics.critic import Critic
from rtb_rl.rl.critics.gaussian_policy import GaussianPolicy
from rtb_rl.rl.critics.identity import critic_fingerprint
from rtb_rl.rl.critics.training import (
    fit_critic,
    fit_gaussian_policy,
    gaussian_config,
    scaled_for_critic,
)
from rtb_rl.rl.data.dataset import TransitionDataset
from rtb_rl.rl.episodes.curve import Curve
from rtb_rl.rl.jobs.budget import Budget
from rtb_rl.rl.jobs.evaluated import evaluate_run, facts_of
from rtb_rl.rl.jobs.report import (
    StatePanel,
    draw_figure,
    print_diagnostics,
    print_end,
    print_table,
    stage_results,
)
from rtb_rl.rl.jobs.run_critic import own_critic
from rtb_rl.rl.jobs.settings import JobSettings, Tilt
from rtb_rl.rl.jobs.shared_stages import (
    SharedStages,
    stage_configs,
    take_over,
    take_over_where_same,
)
from rtb_rl.rl.posteriors.acting_strength import fit_acting_strength
from rtb_rl.rl.posteriors.amortised import AmortisedSettings, fit_amortised
from rtb_rl.rl.posteriors.posterior import PosteriorSettings, fit_posterior
from rtb_rl.rl.posteriors.prior import ActionDiffusion, fit_prior
from rtb_rl.rl.posteriors.strength import beta_for_ess
from rtb_rl.training.memory import peak_of_this_run
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import device_for_training, fingerprint

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """An open run with its data and budget."""

    settings: JobSettings
    tilt: Tilt
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

    def take_over(self, name: str) -> None:
        """Copy the complete prior or critic of the run to share, where there is one and none is
        here yet; InputError for one of another configuration.
        """
        configs = stage_configs(self.dataset, self.budget, seed=self.settings.seed)
        take_over(self.settings.share, self.out / name, configs[name])

    def prior(self) -> ActionDiffusion:
        """The behaviour prior, fitted."""
        budget, seed = self.budget.prior, self.settings.seed
        self.take_over("prior")
        return self.stage(
            "prior",
            {"prior": asdict(budget)},
            lambda directory: fit_prior(directory, self.dataset, budget, seed=seed),
        )

    def critic(self) -> Critic:
        """The user's critic, checked and where training is, or IQL's, fitted."""
        spec, budget, seed = self.tilt.critic, self.budget.critic, self.settings.seed
        if spec is not None:
            return own_critic(spec, self.dataset, device=device_for_training())
        self.take_over("critic")
        Console().print(f"critic: {scaled_for_critic(self.dataset, budget)[1]}", highlight=False)
        return self.stage(
            "critic",
            {"critic": asdict(budget)},
            lambda directory: fit_critic(directory, self.dataset, budget, seed=seed),
        )

    def made_of(self, prior: ActionDiffusion, critic: Critic) -> dict[str, Any]:
        """What makes a stage of this prior and critic another one than that of others."""
        told = critic_fingerprint(critic, self.dataset, device=device_for_training())
        made_of = fingerprint(prior), told
        return {"made_of": made_of, "critic_spec": self.tilt.critic}

    def gaussian_policy(self, critic: Critic) -> GaussianPolicy:
        """IQL's own policy from this critic, fitted."""
        budget, seed = self.budget.gaussian, self.settings.seed
        config = gaussian_config(
            self.dataset, critic, budget, seed=seed, device=device_for_training()
        )
        take_over_where_same(self.settings.share, self.out / "iql", config)
        return self.stage(
            "iql",
            {
                "gaussian": asdict(budget),
                "critic": config["critic"],
                "critic_spec": self.tilt.critic,
                "curve": self.settings.curve or None,
            },
            lambda directory: fit_gaussian_policy(
                directory, self.dataset, critic, budget, seed=seed, watch=self.curve(directory)
            ),
        )

    def posterior_settings(self, prior: ActionDiffusion, critic: Critic) -> PosteriorSettings:
        """Those of the budget, with the beta that `ess` or `kl` asks for."""
        share, seed = self.tilt.ess, self.settings.seed
        if self.tilt.kl is not None:
            own = self.budget.amortised()
            model = self.amortised(prior, critic, own)
            beta = self.acting_strength(prior, model, critic, own, self.tilt.kl)
            return self.budget.with_beta(beta).posterior
        if share is None:
            return self.budget.posterior
        generator = generator_for(seed, "beta", device=prior.device)
        beta = beta_for_ess(prior, critic, self.dataset, share, generator=generator)
        Console().print(f"beta {beta:.4g}: prior draws keep an ESS of {share}", highlight=False)
        return self.budget.with_beta(beta).posterior

    def amortised(
        self,
        prior: ActionDiffusion,
        critic: Critic,
        settings: AmortisedSettings,
        acting_beta: float | None = None,
    ) -> ScaledCorrection:
        """The posterior of all strengths, fitted; its curve is that of the acting beta."""
        curve = self.settings.curve or None if acting_beta is not None else None
        facts = {"amortised": asdict(settings), "acting_beta": acting_beta, "curve": curve}
        return self.stage(
            "amortised",
            {**facts, **self.made_of(prior, critic)},
            lambda directory: fit_amortised(
                directory,
                self.dataset,
                prior,
                critic,
                settings,
                acting_beta=acting_beta,
                seed=self.settings.seed,
                watch=self.curve(directory),
            ),
        )

    def acting_strength(
        self,
        prior: ActionDiffusion,
        model: ScaledCorrection,
        critic: Critic,
        settings: AmortisedSettings,
        nats: float,
    ) -> float:
        """The largest beta at which the paths of the posterior of all strengths are within."""
        given = self.out / "acting", self.dataset, prior, model, critic, settings, nats
        beta = fit_acting_strength(*given, seed=self.settings.seed)
        end = ", the strongest it is trained for" if beta == settings.high else ""
        Console().print(
            f"beta {beta:.4g}{end}: the posterior's paths stay within {nats:g} nats of the prior's",
            highlight=False,
        )
        return beta

    def posterior(
        self, prior: ActionDiffusion, critic: Critic, settings: PosteriorSettings
    ) -> ActionDiffusion:
        """The posterior of this prior and critic, fitted."""
        return self.stage(
            "posterior",
            {
                "posterior": asdict(settings),
                "curve": self.settings.curve or None,
                **self.made_of(prior, critic),
            },
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
        counts = {"episodes": self.budget.episodes, "seed": self.settings.seed}
        rows, told = evaluate_run(self.run, methods, dataset, critic, **counts)
        timings, diagnostics = stage_results(self.out)
        print_table(dataset, rows)
        print_diagnostics(diagnostics)
        figure = draw_figure(self.out / "figure.png", dataset, rows, panels)
        self.run.log_figure(0, "evaluation", figure)
        self.run.finish(
            {
                "methods": rows,
                "diagnostics": diagnostics,
                "timings": timings,
                **facts_of(self.run, dataset),
                "critic_sha256": told,
                "curve": curve.points,
                "best": curve.best,
                "wall_seconds": time.monotonic() - self.begun,
                "peak_memory_bytes": peak_of_this_run(),
            }
        )
        print_end(self.out, timings, curve, trained)
