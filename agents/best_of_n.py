"""The prior proposes N actions and the critic picks one (IDQL-like, arXiv 2304.10573).

rtb-rl run best_of_n --dataset hopper-medium-replay.hdf5 --share runs/hopper --out
runs/hopper-bon
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from rtb_rl.rl import Candidates, JobSettings, OwnCritic, open_job


@dataclass(frozen=True)
class Settings(JobSettings, OwnCritic, Candidates):
    """Best of N prior draws by the critic."""


def main(settings: Settings) -> None:
    """Fit prior and critic and evaluate the critic's choice among N draws."""
    tuning = Path(__file__).with_name("rtb_iql.toml")
    job = open_job(
        settings,
        program="best_of_n",
        method="best_of_n",
        tuning_file=tuning,
        uses=("prior", "critic"),
    )
    job.prior()
    critic = job.critic()
    job.finish(["prior", "best_of_n"], critic=critic)


if __name__ == "__main__":
    main(tyro.cli(Settings))
