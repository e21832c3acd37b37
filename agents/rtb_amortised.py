"""One posterior for a range of beta, which is chosen when acting.

rtb-rl run rtb_amortised --dataset hopper-medium-replay.hdf5 --share runs/hopper --out
runs/hopper-amortised

As rtb_iql, but the strength of the critic is one more input of the posterior, drawn anew for every
state of an update. The run acts at --beta, or at the one that --kl or --ess asks for; with --kl it
has no learning curve, since that beta is found after training.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from rtb_rl.rl import (
    AmortisedSettings,
    Budget,
    JobSettings,
    OwnCritic,
    StrengthByRule,
    open_job,
)
from rtb_rl.rl.posteriors.amortised import check_acting

STRONGEST = AmortisedSettings().high


@dataclass(frozen=True)
class Settings(JobSettings, OwnCritic, StrengthByRule):
    """RTB for all strengths of the critic at once."""

    low: float = 0.3
    """Weakest beta trained for."""
    high: float | None = None
    """Strongest; not given: 10, or the beta that the run acts at where that is more."""

    def check(self) -> None:
        super().check()
        own = AmortisedSettings(low=self.low, high=strongest(self, self.beta or 0.0))
        if self.beta is not None:
            check_acting(self.beta, own)


def main(settings: Settings) -> None:
    """Fit prior, critic and the posterior of all strengths, and evaluate one of them."""
    job = open_job(
        settings,
        program="rtb_amortised",
        method="rtb_amortised",
        tuning_file=Path(__file__).with_name("rtb_iql.toml"),
        own=lambda budget: {"amortised": asdict(strengths(settings, budget))},
        uses=("prior", "critic"),
    )
    prior, critic = job.prior(), job.critic()
    if settings.kl is not None:
        own = job.budget.amortised(low=settings.low, high=strongest(settings))
        model = job.amortised(prior, critic, own)
        job.acting_strength(prior, model, critic, own, settings.kl)
    else:
        beta = job.posterior_settings(prior, critic).finetune.beta
        own = job.budget.amortised(low=settings.low, high=strongest(settings, beta))
        job.amortised(prior, critic, own, beta)
    job.finish(["prior", "rtb_amortised"], trained="amortised", critic=critic)


def strengths(settings: Settings, budget: Budget) -> AmortisedSettings:
    """The range, as far as it is known before the critic; InputError for a beta outside of it."""
    if settings.kl is not None or settings.ess is not None:  # found when the critic is there
        return AmortisedSettings(low=settings.low, high=strongest(settings))
    beta = budget.posterior.finetune.beta
    own = AmortisedSettings(low=settings.low, high=strongest(settings, beta))
    check_acting(beta, own)
    return own


def strongest(settings: Settings, beta: float = 0.0) -> float:
    """The strongest beta trained for, of a run that acts at `beta` if that is known."""
    return max(STRONGEST, beta) if settings.high is None else settings.high


if __name__ == "__main__":
    main(tyro.cli(Settings))
