"""QGPO: the behaviour prior guided by a learned energy when it acts (arXiv 2304.12824).

rtb-rl run qgpo --dataset hopper-medium-replay.hdf5 --out runs/hopper-qgpo

Prior and critic, then an energy network that says at every noise level how good the actions are
that a noisy one may have come from. The critic is QGPO's own, backed up by the softmax-weighted Q
of the prior's actions, or IQL's, for a comparison of what methods extract from the same critic.
"""

import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from rtb_rl.errors import InputError
from rtb_rl.rl import (
    ActionDiffusion,
    Critic,
    EnergyGuidanceSettings,
    Job,
    JobSettings,
    OwnCritic,
    SoftCriticSettings,
    StrengthByRule,
    fit_energy_guidance,
    fit_soft_critic,
    open_job,
)
from rtb_rl.training.stage import fingerprint

STEPS = {"smoke": 200, "demo": 4_000, "full": 20_000}
ROWS = {"smoke": 1_000, "demo": 50_000, "full": None}


@dataclass(frozen=True)
class Settings(JobSettings, OwnCritic, StrengthByRule):
    """QGPO; `beta` serves the energy and the backup, the authors' 3 where nothing is tuned."""

    critic_kind: Literal["softmax", "iql"] = "softmax"
    """QGPO's own critic or IQL's; --critic gives one of your own instead."""
    scale: float = 1.0
    """Factor of the guidance, exact at 1; the authors report the best of 0, 1, 2, 3, 5, 8, 10 a
    task. Other values reuse what was fitted, by --stages."""
    backup_actions: int = 16
    """Draws of the prior in each state; the authors' 16, and 32 on antmaze."""
    batch: int = 64
    """States a step of the energy, with all their draws; the authors took 256."""
    rows: int | None = None
    """Transitions of which draws are made; not given: as the budget says, all in full."""
    steps: int | None = None
    """Updates of the energy; not given: as the budget says, 20,000 in full. The authors took
    1,000,000."""

    def check(self) -> None:
        super().check()
        if not math.isfinite(self.scale):
            raise InputError(
                f"--scale is {self.scale}; give a finite number, 1 for the guidance that is learnt"
            )
        energy_settings(self)


def main(settings: Settings) -> None:
    """Fit prior, critic and energy, skipping what is complete, and evaluate."""
    own_critic, energy = has_own_critic(settings), energy_settings(settings)
    job = open_job(
        settings,
        program="qgpo",
        method="qgpo",
        tuning_file=Path(__file__).with_name("rtb_iql.toml"),
        own={
            "qgpo": {
                "scale": settings.scale,
                "critic_kind": settings.critic_kind,
                **{name: value for name, value in asdict(energy).items() if name != "beta"},
            }
        },
        uses=("prior",) if own_critic else ("prior", "critic"),
    )
    prior, draws = job.prior(), job.out / "prior_actions"
    critic = softmax_critic(job, prior, energy, draws) if own_critic else job.critic()
    chosen = replace(energy, beta=job.posterior_settings(prior, critic).finetune.beta)
    facts = {
        "qgpo": asdict(chosen),
        **job.made_of(prior, critic),
        "watched_at": settings.scale if settings.curve else None,
        "curve": settings.curve or None,
    }
    job.stage(
        "qgpo",
        facts,
        lambda directory: fit_energy_guidance(
            directory,
            job.dataset,
            prior,
            critic,
            chosen,
            scale=settings.scale,
            seed=settings.seed,
            actions=draws,
            watch=job.curve(directory),
        ),
    )
    shutil.rmtree(draws, ignore_errors=True)  # both stages have what they needed of them
    job.finish(["qgpo"], trained="qgpo", critic=critic)


def has_own_critic(settings: Settings) -> bool:
    """Whether the critic is QGPO's."""
    return settings.critic_kind == "softmax" and settings.critic is None


def energy_settings(settings: Settings) -> EnergyGuidanceSettings:
    """Those of the energy; InputError for a beta that can't be chosen before it is used."""
    if has_own_critic(settings) and (settings.ess is not None or settings.kl is not None):
        raise InputError(
            "--ess and --kl choose beta for a critic that is there, and qgpo's own is backed up by"
            " beta; give --beta, or --critic-kind iql"
        )
    return EnergyGuidanceSettings(
        candidates=settings.backup_actions,
        rows=ROWS[settings.budget] if settings.rows is None else settings.rows,
        steps=STEPS[settings.budget] if settings.steps is None else settings.steps,
        batch=settings.batch,
    )


def softmax_critic(
    job: Job, prior: ActionDiffusion, energy: EnergyGuidanceSettings, draws: Path
) -> Critic:
    """QGPO's critic, from the draws that the energy is learnt from; the network is as IQL's."""
    critic = job.budget.critic
    own = SoftCriticSettings(
        backup="softmax",
        beta=job.budget.posterior.finetune.beta,
        candidates=energy.candidates,
        rows=energy.rows,
        steps=critic.steps,
        discount=critic.discount,
    )
    return job.stage(
        "soft_critic",
        {"soft_critic": asdict(own), "critic": asdict(critic), "prior": fingerprint(prior)},
        lambda directory: fit_soft_critic(
            directory,
            job.dataset,
            prior,
            own,
            critic_settings=critic,
            seed=job.settings.seed,
            actions=draws,
        ),
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
