"""Offline RL with relative trajectory balance: behaviour prior, IQL critic, posterior, episodes.

    rtb-rl run rtb_iql --dataset hopper-medium-replay.hdf5 --out runs/hopper

Four stages, each in a directory of its own under --out: prior/ learns mu(a|s) from the data,
critic/ learns Q(s, a) by implicit Q-learning, posterior/ fine-tunes the prior towards
mu(a|s) exp(beta Q(s, a)) / Z(s), evaluation/ runs episodes. The baselines share prior and critic:
the prior itself, the best of N prior draws by the critic, and IQL's own Gaussian policy (iql/).
Beta is tuned per data set, given, or found offline by --ess or --kl (which adds amortised/, a
posterior of all strengths, and acting/).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from rtb_rl.rl import Candidates, JobSettings, OwnCritic, StrengthByRule, open_job, state_panels


@dataclass(frozen=True)
class Settings(JobSettings, OwnCritic, StrengthByRule, Candidates):
    """Offline RL with relative trajectory balance."""

    grouped_log_z: bool = True
    """Log Z(s) is the mean over the paths of a state; with --no-grouped-log-z it is a network."""
    langevin: bool = False
    """Let the posterior use the critic's gradient, which must then exist; acting takes longer."""


def main(settings: Settings) -> None:
    """Fit prior, critic and posterior, skipping what is complete, and evaluate."""
    job = open_job(
        settings,
        program="rtb_iql",
        method="rtb",
        tuning_file=Path(__file__).with_suffix(".toml"),
        uses=("prior", "critic"),
    )
    prior, critic = job.prior(), job.critic()
    methods = ["prior", "best_of_n", "rtb"]
    if hasattr(critic, "v"):
        job.gaussian_policy(critic)
        methods.insert(1, "iql")
    chosen = replace(
        job.posterior_settings(prior, critic),
        grouped_log_z=settings.grouped_log_z,
        langevin=settings.langevin,
    )
    posterior = job.posterior(prior, critic, chosen)
    panels = state_panels(
        job.dataset, prior, posterior, critic, chosen.finetune.beta, seed=settings.seed
    )
    job.finish(methods, trained="posterior", critic=critic, panels=panels)


if __name__ == "__main__":
    main(tyro.cli(Settings))
