"""rtb_iql for several seeds at once: prior, critic and posterior of all seeds as one network each.

    rtb-rl run rtb_iql_seeds --dataset hopper-medium-replay.hdf5 --seeds 0 1 2 --out runs/hopper

OUT/seed0, OUT/seed1, ... are ordinary finished runs of rtb_iql, with the same weights to rounding;
an interrupted seed can also be continued by rtb_iql. The seconds of a stage are an equal share of
those of all seeds; `wall_seconds` counts from the start of the program.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from rtb_rl.errors import InputError
from rtb_rl.rl import Candidates, Job, JobSettings, OwnCritic, Strength, open_job, state_panels
from rtb_rl.rl.seeds import fit_critics, fit_posteriors, fit_priors


@dataclass(frozen=True)
class Settings(JobSettings, OwnCritic, Strength, Candidates):
    """Offline RL with relative trajectory balance for several seeds; --seed is not used."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each gets a directory of its own under --out."""
    grouped_log_z: bool = True
    """Log Z(s) as the mean over the paths of a state; --no-grouped-log-z: as a network."""
    langevin: bool = False
    """Let the posterior use the critic's gradient, which must then exist; acting takes longer."""

    def check(self) -> None:
        super().check()
        for name in ("stages", "curve"):
            if getattr(self, name):
                raise InputError(
                    f"rtb_iql_seeds trains all seeds at once and can't take --{name}; leave it out,"
                    " or run rtb_iql seed by seed"
                )
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise InputError(f"--seeds {self.seeds} must be different numbers, at least one")


def main(settings: Settings) -> None:
    """Fit prior, critic and posterior of all seeds, skipping what is complete, and evaluate."""
    jobs = _open(settings)
    data, budget, seeds = jobs[0].dataset, jobs[0].budget, settings.seeds
    priors = fit_priors([job.out / "prior" for job in jobs], data, budget.prior, seeds=seeds)
    if settings.critic is None:
        fit_critics([job.out / "critic" for job in jobs], data, budget.critic, seeds=seeds)
    critics = [job.critic() for job in jobs]
    methods = ["prior", "best_of_n", "rtb"]
    if hasattr(critics[0], "v"):
        for job, critic in zip(jobs, critics, strict=True):
            job.gaussian_policy(critic)
        methods.insert(1, "iql")
    chosen = replace(
        budget.posterior, grouped_log_z=settings.grouped_log_z, langevin=settings.langevin
    )
    posteriors = fit_posteriors(
        [job.out / "posterior" for job in jobs], data, priors, critics, chosen, seeds=seeds
    )
    beta = chosen.finetune.beta
    for n, job in enumerate(jobs):
        panels = state_panels(data, priors[n], posteriors[n], critics[n], beta, seed=seeds[n])
        job.finish(methods, trained="posterior", critic=critics[n], panels=panels)


def _open(settings: Settings) -> list[Job]:
    """A job for every seed, with one data set for all."""
    settings.check()
    stages = ("prior", "critic") if settings.critic is None else ("prior",)
    jobs: list[Job] = []
    for seed in settings.seeds:
        job = open_job(
            replace(settings, seed=seed, out=settings.out / f"seed{seed}"),
            program="rtb_iql",
            method="rtb",
            tuning_file=Path(__file__).with_name("rtb_iql.toml"),
            uses=stages,
        )
        jobs.append(replace(job, dataset=jobs[0].dataset) if jobs else job)
    for job in jobs:
        for stage in stages:
            job.take_over(stage)
    return jobs


if __name__ == "__main__":
    main(tyro.cli(Settings))
