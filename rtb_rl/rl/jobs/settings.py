"""The options of offline-RL programs: those that all have, and those of a critic and its strength.

A program takes what it has a use for, so that an option without effect is an unknown one:

    class Settings(JobSettings, OwnCritic, StrengthByRule, Candidates)
"""

from dataclasses import dataclass, fields
from pathlib import Path

from rtb_rl.errors import InputError
from rtb_rl.rl.jobs.budget import BudgetName
from rtb_rl.rl.jobs.shared_stages import complete_stages
from rtb_rl.rl.posteriors.strength import check_rule
from rtb_rl.training.settings import check_beta


@dataclass(frozen=True)
class JobSettings:
    """What all offline-RL programs ask for."""

    dataset: str | None = None
    """D4RL task, ogbench: and a single task, Minari id, or .hdf5 / .npz file; not given: made with
    the behaviour policies that come with the package."""
    env_id: str | None = None
    """Gymnasium environment to evaluate in, plain or with options as in Pendulum-v1{"g":2.0}; found
    from the data set where it says so."""
    out: Path = Path("runs/latest")
    """Directory of the run; the same command continues what it finds there."""
    seed: int = 0
    budget: BudgetName = "full"
    """smoke: every stage in seconds; demo: minutes; full: about 20 minutes on two cores."""
    share: Path | None = None
    """Run whose prior and critic, fitted with the same settings, are taken over."""
    stages: Path | None = None
    """Directory of stages that several runs share: each is fitted once, by the first to need it."""
    curve: int = 0
    """How many times the policy is evaluated while it is trained, 5 episodes each."""
    clip_actions: bool = False
    """Clip recorded actions outside the environment's box instead of refusing them."""

    def check(self) -> None:
        """InputError for options that no run can have, as far as they tell it without any data.

        A program with numbers of its own adds to it; a grid asks before it starts anything.
        """
        tilt = tilt_of(self)
        least = {"seed": (self.seed, 0), "curve": (self.curve, 0)}
        for name, (value, bound) in (least | {"candidates": (tilt.candidates, 1)}).items():
            if value < bound:
                raise InputError(f"--{name} is {value}; give at least {bound}")
        if tilt.beta is not None:
            check_beta(tilt.beta)
        check_rule(tilt.beta, tilt.ess, tilt.kl)
        _check_critic_steps(tilt.critic_steps, tilt.critic)
        if self.share is not None and not complete_stages(self.share):
            raise InputError(
                f"{self.share} holds no complete prior, critic or iql; give another --share"
            )


@dataclass(frozen=True)
class OwnCritic:
    """For programs that follow any critic."""

    critic: str | None = None
    """package.module:factory of a critic of your own, instead of IQL's."""
    critic_steps: int | None = None
    """Updates of the critic that is fitted; not given: as the budget says, 40,000 in full."""


@dataclass(frozen=True)
class Strength:
    """For programs that tilt a prior."""

    beta: float | None = None
    """Strength of the critic; not given: as tuned for the data set."""


@dataclass(frozen=True)
class StrengthByRule(Strength):
    """For programs whose critic is there before its strength is chosen."""

    ess: float | None = None
    """Instead of a beta: the largest at which draws of the prior, weighted by exp(beta Q), keep
    this effective sample size, a share between 0 and 1. Needs no episode and no training."""
    kl: float | None = None
    """Instead of a beta: the largest at which the posterior's paths stay within so many nats of the
    prior's, by a posterior of all strengths trained for it. Needs no episode."""


@dataclass(frozen=True)
class Candidates:
    """For programs that evaluate the best of N draws."""

    candidates: int = 16
    """Actions among which best_of_n lets the critic choose."""


@dataclass(frozen=True)
class Tilt(OwnCritic, StrengthByRule, Candidates):
    """What a program was asked of its critic; as by default where it has no such option."""


def tilt_of(settings: JobSettings) -> Tilt:
    """Those of the program's settings that a `Tilt` has."""
    known = {f.name for f in fields(Tilt)}
    return Tilt(**{name: value for name, value in vars(settings).items() if name in known})


def _check_critic_steps(steps: int | None, own: str | None) -> None:
    if steps is None:
        return
    if own is not None:
        raise InputError(
            f"--critic-steps {steps} is for a critic that is fitted, and --critic {own} comes as it"
            " is; give one of the two"
        )
    if steps < 1:
        raise InputError(f"--critic-steps is {steps}; give at least 1")
