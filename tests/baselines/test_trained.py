"""The trained baselines by name take a posterior's settings over, and refuse what it refuses."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Generator, nn

from rtb_rl.baselines.trained import baseline_settings, make_learner, trained_methods
from rtb_rl.baselines.trainer import BaselineSettings
from rtb_rl.core import GaussianDiffusion, cosine_schedule, zero_terminal_signal
from rtb_rl.core.gaussian import small_spread
from rtb_rl.core.last_steps import PriorInLastSteps
from rtb_rl.errors import InputError
from rtb_rl.training import FinetuneSettings, Task

LEVELS = 4
SCHEDULE = zero_terminal_signal(cosine_schedule(LEVELS))
DIFFUSION = GaussianDiffusion(SCHEDULE, (2,), small_spread(SCHEDULE, floor=0.05))
SETTINGS = BaselineSettings(conditions=1, paths=8, chunk=4, learning_rate=0.1)


class Linear(nn.Module):
    """weight x + shift, whatever the level."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.8, 0.5]))
        self.shift = nn.Parameter(torch.tensor([0.1, -0.2]))

    def forward(self, x, level, condition):
        return self.weight * x + self.shift


def new_task(steps: int = 0) -> Task:
    """The posterior is the prior in so many last steps."""
    prior = Linear()
    posterior = PriorInLastSteps(copy.deepcopy(prior), prior, steps)
    return Task("pair", DIFFUSION, prior, posterior, lambda x0, condition: -x0.square().sum(1))


def learner(name: str, task: Task, settings: BaselineSettings = SETTINGS):
    return make_learner(trained_methods()[name], task, settings, generator=Generator())


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", trained_methods())
def test_a_beta_that_is_no_strength_is_refused(name, beta):
    with pytest.raises(InputError, match="give a positive number"):
        learner(name, new_task(), replace(SETTINGS, beta=beta))


def test_all_settings_that_both_have_are_taken_over():
    given = FinetuneSettings(
        updates=7,
        draw_batch=3,
        levels_per_path=9,
        chunk=5,
        learning_rate=0.2,
        last_learning_rate=0.3,
        gradient_clip=0.01,
        average_decay=0.5,
        log_reward_floor=-50.0,
    )
    found = baseline_settings(given, LEVELS, beta=2.0, conditions=4, paths=6)
    assert found == BaselineSettings(
        updates=7,
        beta=2.0,
        conditions=4,
        paths=6,
        draw_batch=3,
        levels_per_path=LEVELS,
        chunk=5,
        learning_rate=0.2,
        last_learning_rate=0.3,
        gradient_clip=0.01,
        average_decay=0.5,
        log_reward_floor=-50.0,
    )


@pytest.mark.parametrize("steps", [2, LEVELS])
@pytest.mark.parametrize("name", trained_methods())
def test_steps_that_are_the_prior_s_have_no_gradient_and_the_others_theirs(name, steps):
    """In chunks of one level each; where all steps are the prior's nothing moves."""
    task = new_task(steps)
    before = task.posterior.posterior.shift.clone()
    metrics = learner(name, task).update(0)
    assert task.posterior.posterior.shift.equal(before) == (steps == LEVELS)
    assert task.prior.shift.equal(before)
    assert all(math.isfinite(float(value)) for value in metrics.values())
