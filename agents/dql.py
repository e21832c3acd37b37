"""Diffusion-QL: a diffusion policy that imitates the data and climbs Q (arXiv 2208.06193).

rtb-rl run dql --dataset hopper-medium-replay.hdf5 --out runs/hopper-dql
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro

from rtb_rl.rl import DiffusionQSettings, JobSettings, fit_diffusion_q, open_job

STEPS = {"smoke": 200, "demo": 5_000, "full": 40_000}


@dataclass(frozen=True)
class Settings(JobSettings):
    """Diffusion-QL."""

    eta: float = 1.0
    """Weight of Q against the denoising loss; the authors' 1 for locomotion, 0.5 to 4.5 antmaze."""
    backup_actions: int = 1
    """Next actions of which the best is backed up; the authors take 10 on most of antmaze."""
    candidates: int = 50
    """Actions drawn to act; one is kept, by the softmax of their Q."""
    steps: int | None = None
    """Updates; not given: as the budget says, 40,000 in full. The authors took 2,000,000."""

    def check(self) -> None:
        super().check()
        own_settings(self)


def own_settings(settings: Settings) -> DiffusionQSettings:
    """Those of Diffusion-QL, but for the discount, which the data set says."""
    return DiffusionQSettings(
        steps=STEPS[settings.budget] if settings.steps is None else settings.steps,
        eta=settings.eta,
        backup_actions=settings.backup_actions,
        candidates=settings.candidates,
    )


def main(settings: Settings) -> None:
    """Train policy and critic together and evaluate the policy."""
    chosen = own_settings(settings)
    job = open_job(
        settings,
        program="dql",
        method="dql",
        tuning_file=Path(__file__).with_name("rtb_iql.toml"),
        own={"dql": asdict(chosen)},
    )
    stage, critic = job.out / "dql", job.budget.critic
    fit_diffusion_q(
        stage,
        job.dataset,
        replace(chosen, discount=critic.discount),
        critic_settings=critic,
        seed=settings.seed,
        watch=job.curve(stage),
    )
    job.finish(["dql"], trained="dql")


if __name__ == "__main__":
    main(tyro.cli(Settings))
