"""Draws of a trained posterior by weight, against a target in closed form.

One step of N(0, 1) and log r = a x: the target at beta is N(a beta, 1), log Z = (a beta)^2 / 2, and
the weights of a posterior N(m, 1) have an effective share of exp(-(a beta - m)^2).
"""

import math

import pytest
import torch
from torch import nn

from rtb_rl.baselines.weighted import posterior_by_weight, weighted_paths
from rtb_rl.core import GaussianDiffusion, PriorInLastSteps, Schedule
from rtb_rl.training.task import Task

SCHEDULE = Schedule(torch.tensor([1.0, 0.0], dtype=torch.float64))
ONE_STEP = GaussianDiffusion(SCHEDULE, (1,), torch.ones(1), dtype=torch.float64)
TILT, BETA, MEAN = 0.5, 2.0, 0.6
PATHS = 8000


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, x, level, condition):
        return self.value.expand(x.shape) + (0 if condition is None else condition[:, None])


def tilted(x0, condition):
    return TILT * x0[:, 0]


TASK = Task("tilted", ONE_STEP, Constant(0.0), Constant(MEAN), tilted)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_kept_draws_have_the_law_of_the_target():
    draws = posterior_by_weight(TASK, None, PATHS // 4, beta=BETA, generator=seeded())
    assert draws.x0.shape == (PATHS // 4, 1)
    assert draws.calls == 2 * 1 * 4
    assert float(draws.x0.mean()) == pytest.approx(TILT * BETA, abs=0.06)
    assert float(draws.x0.var()) == pytest.approx(1.0, abs=0.1)
    assert draws.log_z is not None and draws.ess is not None
    assert float(draws.log_z) == pytest.approx((TILT * BETA) ** 2 / 2, abs=0.02)
    assert float(draws.ess) == pytest.approx(math.exp(-((TILT * BETA - MEAN) ** 2)), abs=0.02)
    assert draws.evidence()["log_z"] == float(draws.log_z)


def test_every_row_of_a_condition_has_its_own_paths():
    """The prior of row c is N(c, 1), so that the target is N(c + a beta, 1)."""
    rows = torch.tensor([0.0, 3.0], dtype=torch.float64)
    draws = posterior_by_weight(TASK, rows, 500, paths=4000, beta=BETA, generator=seeded())
    assert draws.x0.shape == (2, 500, 1)
    torch.testing.assert_close(draws.x0.mean(1)[:, 0], rows + TILT * BETA, atol=0.15, rtol=0)
    assert draws.log_z is not None
    expected = TILT * BETA * rows + (TILT * BETA) ** 2 / 2
    torch.testing.assert_close(draws.log_z, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("batch", [None, 7])
def test_weights_are_those_of_the_ends_and_their_densities(batch):
    """Of a single step: log r^beta N(x; 0, 1) / N(x; m, 1)."""
    found = weighted_paths(TASK, None, 20, beta=BETA, batch=batch, generator=seeded(1))
    x = found.x0[0, :, 0]
    expected = BETA * TILT * x + ((x - MEAN).square() - x.square()) / 2
    torch.testing.assert_close(found.log_weight[0], expected)


def test_steps_that_are_the_prior_s_are_paid_for_once():
    prior = Constant(0.0)
    posterior = PriorInLastSteps(Constant(MEAN), prior)
    task = Task("tilted", ONE_STEP, prior, posterior, tilted)
    for steps, calls in ((0, 8.0), (1, 4.0)):
        posterior.steps.fill_(steps)
        assert posterior_by_weight(task, None, 10, generator=seeded()).calls == calls
