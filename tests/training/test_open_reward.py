"""What is open of a reward at a level, against its closed form, and the steps left to the prior.

Data N(0, 1), r = exp(a x_0): under the target x_0 | x_k is N(D + a noise^2, noise^2), D what the
prior predicts, so that a (x_0 - D), what is open, is N(a^2 noise^2, a^2 noise^2).
"""

import math

import pytest
import torch
from test_rewarded import (
    DIFFUSION,
    DRAWS,
    LEVELS,
    SCHEDULE,
    THOROUGH,
    TILT,
    Linear,
    constant,
    linear,
    seeded,
    wanted,
)

from rtb_rl.core import PriorInLastSteps, steps_of_prior
from rtb_rl.training import Task, rewarded
from rtb_rl.training.rewarded import RewardedSettings, RewardedTrainer
from rtb_rl.training.rewarded_draws import RewardedDraws


def trainer_of(settings, log_reward=linear):
    prior = Linear()
    posterior = PriorInLastSteps(Linear(), prior)
    task = Task("linear", DIFFUSION, prior, posterior, log_reward)
    x0 = torch.randn(DRAWS, 2, dtype=torch.float64, generator=seeded(1))
    draws = RewardedDraws.of_one_prior(task, x0, None, 1.0)
    return RewardedTrainer(task, draws, 1.0, settings, generator=seeded())


def exact(level):
    """E|N(m, m)| with m = a^2 noise^2."""
    mean = (TILT * float(SCHEDULE.noise[level])) ** 2
    tail = math.sqrt(2 * mean / math.pi) * math.exp(-mean / 2)
    return tail + mean * math.erf(math.sqrt(mean / 2))


def test_what_is_open_has_its_closed_form(monkeypatch):
    monkeypatch.setattr(rewarded, "OPEN_PROBES", DRAWS)
    trainer = trainer_of(RewardedSettings(batch=1000))
    for level in range(1, LEVELS + 1):
        assert trainer._open(level) == pytest.approx(exact(level), abs=0.02)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_steps_with_less_open_than_the_limit_stay_the_priors(steps):
    limit = (exact(steps) + exact(steps + 1)) / 2 if steps else 0.0
    trainer = trainer_of(RewardedSettings(open_limit=limit))
    assert steps_of_prior(trainer.task.posterior) == steps
    assert steps_of_prior(trainer.average.module) == steps


def test_a_reward_that_says_nothing_leaves_one_step():
    trainer = trainer_of(RewardedSettings(), constant)
    assert steps_of_prior(trainer.task.posterior) == LEVELS - 1


def test_the_other_steps_end_in_the_denoiser_of_the_target():
    limit = (exact(1) + exact(2)) / 2
    trainer = trainer_of(RewardedSettings(**{**vars(THOROUGH), "open_limit": limit}))
    for step in range(trainer.settings.steps):
        trainer.update(step)
    shift = trainer.average.module.posterior.shift[0].detach()
    assert (shift[1] == 0).all()
    torch.testing.assert_close(shift[2:, 0], wanted(TILT)[1:], atol=0.04, rtol=0)
