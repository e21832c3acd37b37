"""Behaviour cloning with a diffusion policy: the prior of the main job, by itself.

rtb-rl run diffusion_bc --dataset hopper-medium-replay.hdf5 --out runs/hopper-bc
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from rtb_rl.rl import JobSettings, open_job


@dataclass(frozen=True)
class Settings(JobSettings):
    """Behaviour cloning with a diffusion policy."""


def main(settings: Settings) -> None:
    """Fit the behaviour prior and evaluate it."""
    tuning = Path(__file__).with_name("rtb_iql.toml")
    job = open_job(
        settings, program="diffusion_bc", method="prior", tuning_file=tuning, uses=("prior",)
    )
    job.prior()
    job.finish(["prior"])


if __name__ == "__main__":
    main(tyro.cli(Settings))
