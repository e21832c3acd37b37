"""A rewarded mode of prior mass 1e-3: which paths find it, and give it the right weight."""

from dataclasses import replace

from rtb_rl.core import huber, rtb
from rtb_rl.exactness.fit import Effort, Row, fit_toy, found, row
from rtb_rl.tasks.toy import mixture_posterior, rare_mode
from rtb_rl.training.mix import Mix
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.settings import FinetuneSettings

LEVELS = 80
"""The prior's steps are Gaussian and give the rare mode too much: at 20 levels twice its mass, at
40 half as much again, at 80 a sixth; 80 put the posterior weight that training tends to at 0.54.
"""

SETTINGS = FinetuneSettings(
    beta_warmup=30,
    conditions=256,
    replay_tilt=1.0,
    levels_per_path=8,
    chunk=2048,
    learning_rate=6e-3,
    last_learning_rate=0.02,
    log_z_learning_rate=0.05,
    average_decay=0.97,
)

RECOMMENDED = "replay"
MIXES = {
    "on-policy alone": Mix(on_policy=4, data=0),
    "widened": Mix(on_policy=2, widened=2, data=0),
    "prior": Mix(on_policy=2, prior=2, data=0),
    "noised data": Mix(on_policy=3, data=1),
    RECOMMENDED: Mix(on_policy=2, replay=2, data=0),
    "prior and replay": Mix(on_policy=1, prior=1, replay=2, data=0),
}
"""What joins the on-policy paths: 1024 paths an update each.

Half on-policy and half replayed in proportion to r is the default for tasks of rare rewards. Any
source draws a rare point about once in a thousand paths; that moves the posterior once and is gone,
and after 120 updates the weight is 0.002 to 0.003 (seed 0). Only a replay shows the point again in
every update: 0.47. Prior draws need no paths of their own, since the posterior starts as the prior
and its first draws are prior draws; taken from the on-policy share, they left 0.43.
"""


def rare_mode_mixes(run: Run, effort: Effort, seed: int) -> list[Row]:
    """The rare mode's posterior weight (exactly 0.5) and its relative error, for each mix."""
    rows = []
    for name in effort.rare_mixes:
        mix = MIXES[name]
        generator = generator_for(seed, "rare")
        toy = rare_mode(
            levels=LEVELS, posterior=mixture_posterior(generator=generator), generator=generator
        )
        settings = replace(SETTINGS, updates=effort.rare_updates, mix=mix)
        stage = run.stage(
            name.replace(" ", "_"), {"seed": seed, "updates": settings.updates, "mix": mix}
        )
        posterior = fit_toy(stage, toy, settings, seed=seed, objective=rtb(huber(3.0)))
        values = found(toy, posterior, seed=seed, draws=8000)
        bound = 0.10 if name == RECOMMENDED else None
        rows += [
            row(f"rare mode, {name}: weight", seed, values["rare_weight"]),
            row(f"rare mode, {name}: relative error", seed, values["rare_weight_error"], bound),
        ]
    return rows
