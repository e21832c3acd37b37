"""Sampler: final points of rollouts, n for each row of the condition."""

import pytest
import torch
from torch import Generator

from rtb_rl.core import GaussianDiffusion, Sampler, conditions, cosine_schedule, rollout
from rtb_rl.core.gaussian import small_spread

SCHEDULE = cosine_schedule(6)
DIFFUSION = GaussianDiffusion(
    SCHEDULE, (2,), small_spread(SCHEDULE, floor=0.01), dtype=torch.float64
)
ROWS = torch.tensor([[-4.0, 1.0], [0.0, 2.0], [7.0, 3.0]], dtype=torch.float64)


def to_the_condition(x, level, condition):
    """The data of a condition is one point: the condition."""
    return condition["point"] if isinstance(condition, dict) else condition


def seeded() -> Generator:
    return Generator().manual_seed(0)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("condition", [ROWS, {"point": ROWS}])
def test_each_row_of_the_condition_gets_n_draws_of_its_own(condition, n):
    x = Sampler(DIFFUSION, to_the_condition).sample(condition, n, generator=seeded())
    assert x.shape == (3, n, 2)
    assert bool(((x - ROWS[:, None]).abs() < 0.01 * 5).all())


def test_draws_are_the_ends_of_rollouts():
    x = Sampler(DIFFUSION, to_the_condition).sample(ROWS, 4, generator=seeded())
    repeated = conditions.repeat(ROWS, 4)
    path = rollout(DIFFUSION, to_the_condition, repeated, 12, generator=seeded())
    assert torch.equal(x.reshape(12, 2), path.x0)


def test_without_condition():
    def half(x, level, condition):
        assert condition is None
        return x / 2

    x = Sampler(DIFFUSION, half).sample(None, 7, generator=seeded())
    assert x.shape == (7, 2)
    assert torch.equal(x, rollout(DIFFUSION, half, None, 7, generator=seeded()).x0)


def test_draws_carry_no_graph():
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    x = Sampler(DIFFUSION, lambda x, level, condition: weight * x).sample(
        None, 3, generator=seeded()
    )
    assert not x.requires_grad
