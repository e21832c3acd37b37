"""The posterior proposes N actions and the critic picks one: best of N on top of RTB.

rtb-rl run rtb_best_of_n --dataset hopper-medium-replay.hdf5 --stages runs/stages --out
runs/hopper-rtb-bon

Given the --stages of a run of rtb_iql it takes the posterior from there.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from rtb_rl.rl import Candidates, JobSettings, OwnCritic, StrengthByRule, open_job


@dataclass(frozen=True)
class Settings(JobSettings, OwnCritic, StrengthByRule, Candidates):
    """Best of N posterior draws by the critic."""


def main(settings: Settings) -> None:
    """Fit prior, critic and posterior and evaluate the critic's choice among N draws."""
    tuning = Path(__file__).with_name("rtb_iql.toml")
    job = open_job(
        settings,
        program="rtb_best_of_n",
        method="rtb_best_of_n",
        tuning_file=tuning,
        uses=("prior", "critic"),
    )
    prior, critic = job.prior(), job.critic()
    job.posterior(prior, critic, replace(job.posterior_settings(prior, critic), grouped_log_z=True))
    job.finish(["rtb", "rtb_best_of_n"], critic=critic)


if __name__ == "__main__":
    main(tyro.cli(Settings))
