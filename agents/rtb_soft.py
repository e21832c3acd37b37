"""RTB towards the critic whose own value it is: log Z(s) / beta of the prior backs up Q.

rtb-rl run rtb_soft --dataset hopper-medium-replay.hdf5 --out runs/hopper-soft

As rtb_iql with another critic. Q(s, a) <- r + discount log Z(s') / beta, log Z the soft value of
the behaviour prior under Q, so that Q is of the policy that RTB samples, with its KL to the prior
as a cost; IQL's Q is of an expectile of the actions in the data. An ensemble with a lower bound,
and layer norm, make it more cautious where there are few data.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from rtb_rl.rl import (
    Candidates,
    JobSettings,
    SoftCriticSettings,
    Strength,
    fit_soft_critic,
    open_job,
    state_panels,
)
from rtb_rl.training.stage import fingerprint

ROWS = {"smoke": 1_000, "demo": 50_000, "full": None}


@dataclass(frozen=True)
class Settings(JobSettings, Strength, Candidates):
    """RTB with the soft value of the behaviour prior as backup."""

    members: int = 2
    """Networks of Q."""
    lower_bound: float | None = None
    """rho of Q = mean - rho std over the members; not given: the least of them."""
    layer_norm: bool = False
    """Normalise the hidden layers of Q."""
    backup_actions: int = 16
    """Draws of the prior in each next state."""
    acting: Literal["rtb", "rtb_best_of_n"] = "rtb"
    """Which policy is the run's own: one draw of the posterior, or the critic's choice among
    several. Both are evaluated; a learning curve is of one draw, and kept with it alone."""
    rows: int | None = None
    """Transitions of which draws are made; not given: as the budget says, all in full."""

    def check(self) -> None:
        super().check()
        critic_settings(self)


def critic_settings(settings: Settings) -> SoftCriticSettings:
    """Those of the critic, but for what the budget and the data set say."""
    return SoftCriticSettings(
        members=settings.members,
        lower_bound=settings.lower_bound,
        layer_norm=settings.layer_norm,
        candidates=settings.backup_actions,
        rows=ROWS[settings.budget] if settings.rows is None else settings.rows,
    )


def main(settings: Settings) -> None:
    """Fit prior, critic and posterior, skipping what is complete, and evaluate."""
    own = critic_settings(settings)
    tuning = Path(__file__).with_name("rtb_iql.toml")
    job = open_job(
        settings,
        program="rtb_soft",
        method=settings.acting,
        tuning_file=tuning,
        own={"soft_critic": asdict(own)},
        uses=("prior",),
    )
    budget, seed = job.budget, settings.seed
    own = replace(
        own,
        beta=budget.posterior.finetune.beta,
        steps=budget.critic.steps,
        discount=budget.critic.discount,
    )
    prior = job.prior()
    critic = job.stage(
        "soft_critic",
        {"soft_critic": asdict(own), "critic": asdict(budget.critic), "prior": fingerprint(prior)},
        lambda directory: fit_soft_critic(
            directory, job.dataset, prior, own, critic_settings=budget.critic, seed=seed
        ),
    )
    chosen = replace(job.posterior_settings(prior, critic), grouped_log_z=True)
    posterior = job.posterior(prior, critic, chosen)
    panels = state_panels(job.dataset, prior, posterior, critic, chosen.finetune.beta, seed=seed)
    methods = ["prior", "best_of_n", "rtb", "rtb_best_of_n"]
    watched = "posterior" if settings.acting == "rtb" else None
    job.finish(methods, trained=watched, critic=critic, panels=panels)


if __name__ == "__main__":
    main(tyro.cli(Settings))
