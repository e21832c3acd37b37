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

from rtb_rl.rl import AmortisedSettings, JobSettings, OwnCritic, StrengthByRule, open_job


@dataclass(frozen=True)
class Settings(JobSettings, OwnCritic, StrengthByRule):
    """RTB for all strengths of the critic at once."""

    low: float = 0.3
    """Weakest beta trained for."""
    high: float = 10.0
    """Strongest."""


def main(settings: Settings) -> None:
    """Fit prior, critic and the posterior of all strengths, and evaluate one of them."""
    tuning = Path(__file__).with_name("rtb_iql.toml")
    own = AmortisedSettings(low=settings.low, high=settings.high)
    job = open_job(
        settings,
        program="rtb_amortised",
        method="rtb_amortised",
        tuning_file=tuning,
        own={"amortised": asdict(own)},
    )
    prior, critic = job.prior(), job.critic()
    own = job.amortised_settings(low=settings.low, high=settings.high)
    if settings.kl is not None:
        model = job.amortised(prior, critic, own)
        job.acting_strength(prior, model, critic, own, settings.kl)
    else:
        job.amortised(prior, critic, own, job.posterior_settings(prior, critic).finetune.beta)
    job.finish(["prior", "rtb_amortised"], trained="amortised", critic=critic)


if __name__ == "__main__":
    main(tyro.cli(Settings))
