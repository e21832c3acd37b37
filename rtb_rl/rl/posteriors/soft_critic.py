"""Critics whose backup looks at actions of the behaviour prior only: nothing outside its support.

    Q(s, a) <- r + discount V(s'),   V(s') a function of Q(s', a_1..M), a_i ~ prior(. | s')

The M actions of each state are drawn once (`prior_actions`). Two backups are given. `soft_value` is
the value of the policy prior exp(beta Q) / Z with its KL to the prior as a cost, which is what RTB
samples: V = log Z / beta. `softmax_value` is in-support softmax Q-learning (arXiv 2304.12824). An
ensemble is read as a lower bound: its minimum, or mean - rho std (arXiv 2502.04778).
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rtb_rl.errors import InputError
from rtb_rl.rl.critics.training import CriticSettings, scaled_for_critic
from rtb_rl.rl.data.dataset import TransitionDataset, data_facts
from rtb_rl.rl.fitted import finished_config
from rtb_rl.rl.posteriors.prior import ActionDiffusion
from rtb_rl.rl.posteriors.prior_actions import (
    PriorActions,
    draw_prior_actions,
    forget_own_actions,
    own_actions,
)
from rtb_rl.rl.posteriors.soft_backup import BACKUPS, least, mean_minus_std
from rtb_rl.rl.posteriors.soft_q_learning import SoftCritic, SoftQLearning
from rtb_rl.training.loop import train
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import GeneratorState, generator_for
from rtb_rl.training.stage import complete, device_for_training, fingerprint, load_weights


@dataclass(frozen=True, kw_only=True)
class SoftCriticSettings:
    """How the critic is trained.

    Network, optimiser and discount are those of `CriticSettings`, so that the backup is the only
    difference. In arXiv 2304.12824 (code of the authors): softmax, beta 3, 16 candidates (32 on
    antmaze), twin Q of depth 3, 500,000 steps, the rest as here.
    """

    beta: float = 3.0
    """Inverse temperature of the backup, per unit of the critic (returns scaled to a range of
    1000)."""
    backup: Literal["soft", "softmax"] = "soft"
    candidates: int = 16
    """M, actions of the prior in every state."""
    rows: int | None = None
    """Transitions used, drawn at random; None: all. Drawing M actions each may take minutes."""
    members: int = 2
    depth: int = 2
    """Hidden layers, of width 256."""
    layer_norm: bool = False
    """Normalise hidden layers of Q (arXiv 2302.02948)."""
    lower_bound: float | None = None
    """rho of mean - rho std; None: the least member counts."""
    steps: int = 40_000
    batch: int = 256
    discount: float = 0.99
    polyak: float = 0.005
    learning_rate: float = 3e-4

    def __post_init__(self):
        if self.backup not in BACKUPS:
            raise InputError(f"backup {self.backup!r} is none of {', '.join(BACKUPS)}; name one")
        for name, value in (("steps", self.steps), ("batch", self.batch), ("rows", self.rows)):
            if value is not None and value < 1:
                raise InputError(f"the soft critic got {name}={value}; give at least 1")
        if self.candidates < 1:
            raise InputError(f"candidates={self.candidates}; a backup needs at least 1 action")
        if not (0 <= self.beta < math.inf and 0 <= self.discount <= 1 and 0 < self.polyak <= 1):
            raise InputError(
                f"the soft critic got beta={self.beta}, discount={self.discount}, polyak="
                f"{self.polyak}; needed beta >= 0, 0 <= discount <= 1, 0 < polyak <= 1"
            )
        if self.lower_bound is not None and not 0 <= self.lower_bound < math.inf:
            raise InputError(f"lower_bound={self.lower_bound}, needed at least 0, or None for min")


def fit_soft_critic(
    directory: str | Path,
    dataset: TransitionDataset,
    prior: ActionDiffusion,
    settings: SoftCriticSettings | None = None,
    *,
    critic_settings: CriticSettings | None = None,
    seed: int = 0,
    actions: Path | None = None,
) -> SoftCritic:
    """Q and V with a backup over draws of the prior, in units of the rewards that a critic of
    `critic_settings` gets.

    `actions`: directory where the draws are kept, shared with other stages of the same prior,
    candidates, rows and seed; None: with the stage's checkpoints, and removed when it is complete.
    """
    settings, directory = settings or SoftCriticSettings(), Path(directory)
    scaled, words = scaled_for_critic(dataset, critic_settings or CriticSettings())
    config = {
        **data_facts(dataset),
        "rewards": words,
        "soft_critic": asdict(settings),
        "prior": fingerprint(prior),
        "seed": seed,
    }
    run, critic = Run(directory, config), _new_critic(config, settings, seed=seed)
    critic.to(device_for_training())

    def fit() -> dict[str, Any]:
        begun = time.monotonic()
        draws = draw_prior_actions(
            actions or own_actions(directory),
            scaled,
            prior,
            candidates=settings.candidates,
            rows=settings.rows,
            seed=seed,
        )
        drawing = time.monotonic() - begun
        critic.scaler.fit(draws.data.observations)
        seconds = _train(run, critic, draws, settings, seed=seed)
        return {"seconds": seconds + drawing, "drawing_seconds": drawing, "rewards": words}

    complete(run, critic, fit)
    forget_own_actions(directory)
    return critic


def _train(
    run: Run, critic: SoftCritic, draws: PriorActions, settings: SoftCriticSettings, *, seed: int
) -> float:
    generator = generator_for(seed, "soft_critic", device=draws.actions.device)
    learner = SoftQLearning(
        critic,
        backup=BACKUPS[settings.backup](settings.beta),
        discount=settings.discount,
        polyak=settings.polyak,
        learning_rate=settings.learning_rate,
    )
    return train(
        run,
        lambda step: learner.update(*draws.sample(settings.batch, generator=generator)),
        {"learner": learner, "generator": GeneratorState(generator)},
        steps=settings.steps,
        description="critic",
    )


def load_soft_critic(directory: str | Path) -> SoftCritic:
    """The critic that `fit_soft_critic` left in a directory."""
    config = finished_config(Path(directory))
    critic = _new_critic(config, SoftCriticSettings(**config["soft_critic"]), seed=0)
    load_weights(Path(directory), critic)
    return critic.requires_grad_(False).eval()


def _new_critic(config: dict[str, Any], settings: SoftCriticSettings, *, seed: int) -> SoftCritic:
    rho = settings.lower_bound
    return SoftCritic(
        config["observation_size"],
        config["action_size"],
        bound=least if rho is None else mean_minus_std(rho),
        members=settings.members,
        depth=settings.depth,
        layer_norm=settings.layer_norm,
        generator=generator_for(seed, "soft_critic", "initial"),
    )
