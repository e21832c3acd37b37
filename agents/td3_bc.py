"""TD3+BC: a deterministic policy that maximises Q and imitates the data (arXiv 2106.06860).

rtb-rl run td3_bc --dataset hopper-medium-replay.hdf5 --out runs/hopper-td3-bc
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro

from rtb_rl.rl import JobSettings, TD3BCSettings, fit_td3_bc, open_job

STEPS = {"smoke": 300, "demo": 15_000, "full": 200_000}


@dataclass(frozen=True)
class Settings(JobSettings):
    """TD3+BC."""

    alpha: float = 2.5
    """Weight of Q against the squared distance from the data's actions."""
    steps: int | None = None
    """Updates; not given: as the budget says, 200,000 in full. The authors took 1,000,000."""

    def check(self) -> None:
        super().check()
        own_settings(self)


def own_settings(settings: Settings) -> TD3BCSettings:
    """Those of TD3+BC, but for the discount, which the data set says."""
    steps = STEPS[settings.budget] if settings.steps is None else settings.steps
    return TD3BCSettings(steps=steps, alpha=settings.alpha)


def main(settings: Settings) -> None:
    """Train policy and critic together and evaluate the policy."""
    chosen = own_settings(settings)
    job = open_job(
        settings,
        program="td3_bc",
        method="td3_bc",
        tuning_file=Path(__file__).with_name("rtb_iql.toml"),
        own={"td3_bc": asdict(chosen)},
    )
    stage, critic = job.out / "td3_bc", job.budget.critic
    fit_td3_bc(
        stage,
        job.dataset,
        replace(chosen, discount=critic.discount),
        critic_settings=critic,
        seed=settings.seed,
        watch=job.curve(stage),
    )
    job.finish(["td3_bc"], trained="td3_bc")


if __name__ == "__main__":
    main(tyro.cli(Settings))
