"""Implicit Q-learning with its own policy: a Gaussian weighted by the advantage (arXiv 2110.06169).

rtb-rl run iql --dataset hopper-medium-replay.hdf5 --out runs/hopper-iql
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from rtb_rl.rl import JobSettings, OwnCritic, open_job


@dataclass(frozen=True)
class Settings(JobSettings, OwnCritic):
    """Implicit Q-learning with a Gaussian policy."""


def main(settings: Settings) -> None:
    """Fit the critic, extract the policy and evaluate its mean action."""
    tuning = Path(__file__).with_name("rtb_iql.toml")
    job = open_job(settings, program="iql", method="iql", tuning_file=tuning, uses=("critic",))
    critic = job.critic()
    job.gaussian_policy(critic)
    job.finish(["iql"], trained="iql", critic=critic)


if __name__ == "__main__":
    main(tyro.cli(Settings))
