"""One population for each condition, through networks that see a few particles at a time."""

import pytest
import torch

from rtb_rl.baselines.draws import in_batches
from rtb_rl.baselines.steering import fk_steering, twisted_smc
from rtb_rl.core import (
    GaussianDiffusion,
    ScaledPrediction,
    cosine_schedule,
    zero_terminal_signal,
)
from rtb_rl.core.gaussian import large_spread
from rtb_rl.tasks.image.methods import Budget, swarm
from rtb_rl.tasks.toy import GaussianDenoiser

LEVELS, DRAWS = 6, 4
SCHEDULE = zero_terminal_signal(cosine_schedule(LEVELS))
CHAIN = GaussianDiffusion(SCHEDULE, (1,), large_spread(SCHEDULE), dtype=torch.float64)
ROW = torch.ones(1, dtype=torch.float64)
PRIOR = GaussianDenoiser(SCHEDULE, ROW, 0.25 * ROW)
BUDGET = Budget(calls=3 * LEVELS, draws=DRAWS, levels=LEVELS)  # 12 particles


class Seen:
    """A function that remembers how many rows it was given at once."""

    def __init__(self, function):
        self.function, self.rows = function, []

    def __call__(self, *given):
        self.rows.append(len(given[0]))
        return self.function(*given)


def reward(x0, condition):
    return -(x0[:, 0] - (0.0 if condition is None else condition)).square()


def drawn(condition, method=fk_steering, **given):
    """Draws of a swarm, and the most rows that denoiser and reward were given."""
    denoiser, log_reward = Seen(PRIOR), Seen(reward)
    generator = torch.Generator().manual_seed(0)
    model = (CHAIN, denoiser, log_reward, condition)
    draws = swarm(method, 1, *model, budget=BUDGET, generator=generator, **given)
    return draws, max(denoiser.rows), max(log_reward.rows)


@pytest.mark.parametrize("method", [fk_steering, twisted_smc])
def test_no_network_sees_more_than_a_batch_and_the_population_is_the_same(method):
    """A population of 12 in batches of 5: the very particles that it had at once."""
    whole, *most = drawn(None, method)
    assert most == [12, 12]
    found, *most = drawn(None, method, batch=5)
    assert most == [5, 5]
    torch.testing.assert_close(found.x0, whole.x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.log_z, whole.log_z)
    assert found.x0.shape == (DRAWS, 1) and found.calls == whole.calls


@pytest.mark.parametrize(("batch", "most"), [(7, 7), (12, 12), (30, 24), (None, 36)])
def test_conditions_are_drawn_together_where_their_populations_fit(batch, most):
    asked = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    draws, *seen = drawn(asked, batch=batch)
    assert seen == [most, most]
    assert draws.x0.shape == (3, DRAWS, 1) and draws.log_z.shape == draws.ess.shape == (3,)
    alone, *_ = drawn(asked[:1], batch=7)
    if batch in (7, 12):  # one after another from one generator: the first is as if alone
        torch.testing.assert_close(draws.x0[:1], alone.x0, rtol=1e-12, atol=1e-12)


def test_predictions_with_a_spread_are_put_together():
    def scaled(x, level, condition):
        return ScaledPrediction(x + level[:, None], x * condition[:, None])

    x, level = torch.randn(7, 2, generator=torch.Generator().manual_seed(0)), torch.arange(7)
    condition = torch.arange(7.0)
    whole, found = (f(x, level, condition) for f in (scaled, in_batches(scaled, 3)))
    assert isinstance(found, ScaledPrediction)
    assert all(torch.equal(one, other) for one, other in zip(whole, found, strict=True))
