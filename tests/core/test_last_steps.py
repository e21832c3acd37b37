"""Last steps of the prior: no log-ratio and no gradient there, all else as without them."""

import copy

import pytest
import torch
from torch import nn

from rtb_rl.core import (
    GaussianDiffusion,
    PriorInLastSteps,
    acting_network,
    backward_in_chunks,
    log_ratio,
    log_snr_schedule,
    random_levels,
    rollout,
    rollout_against,
    steps_of_prior,
    zero_terminal_signal,
)
from rtb_rl.core.gaussian import large_spread

LEVELS, BATCH, LAST = 5, 6, 2
SCHEDULE = zero_terminal_signal(log_snr_schedule(LEVELS))
DIFFUSION = GaussianDiffusion(SCHEDULE, (3,), large_spread(SCHEDULE), dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Affine(nn.Module):
    """One weight a level; a condition is added."""

    def __init__(self, seed):
        super().__init__()
        values = torch.randn(LEVELS + 1, 3, generator=seeded(seed), dtype=torch.float64)
        self.weight = nn.Parameter(values)

    def forward(self, x, level, condition):
        return self.weight[level] * x + (0 if condition is None else condition)


@pytest.fixture
def pair():
    return Affine(0), Affine(1)


@pytest.mark.parametrize("conditional", [False, True])
def test_steps_of_the_prior_cost_nothing_and_others_are_as_before(pair, conditional):
    """By steps of one level, as paths are drawn, and by steps of all levels at once."""
    prior, posterior = pair
    wrapped = PriorInLastSteps(posterior, prior, LAST)
    condition = torch.randn(BATCH, 3, generator=seeded(2)).double() if conditional else None
    path, ratio = rollout_against(DIFFUSION, wrapped, prior, condition, BATCH, generator=seeded(3))
    every = [torch.full((1, BATCH), k) for k in range(1, LEVELS + 1)]
    with torch.no_grad():
        ours = [log_ratio(DIFFUSION, wrapped, prior, path, levels=k) for k in every]
        free = [log_ratio(DIFFUSION, posterior, prior, path, levels=k) for k in every]
        mixed = log_ratio(DIFFUSION, wrapped, prior, path)
    assert all(bool((step == 0).all()) for step in ours[:LAST])
    assert all(bool((step != 0).any()) for step in free)
    torch.testing.assert_close(ours[LAST:], free[LAST:], rtol=0, atol=0)
    torch.testing.assert_close(mixed, torch.stack(ours).sum(0))
    torch.testing.assert_close(ratio, mixed)


def test_a_path_asks_the_prior_once_a_step(pair):
    """In the last steps one prediction of the prior serves both; another prior is asked as well."""
    prior, posterior = pair
    wrapped = PriorInLastSteps(posterior, prior, LAST)
    same, asked = copy.deepcopy(prior), []
    prior.register_forward_hook(lambda *_: asked.append(1))
    _, ratio = rollout_against(DIFFUSION, wrapped, prior, None, BATCH, generator=seeded())
    assert len(asked) == LEVELS
    _, again = rollout_against(DIFFUSION, wrapped, same, None, BATCH, generator=seeded())
    assert len(asked) == LEVELS + LAST
    torch.testing.assert_close(again, ratio, rtol=0, atol=0)


def test_gradients_leave_out_steps_that_have_none(pair):
    """`first` is what all levels give, and subsets of first..K have it on average."""
    prior, posterior = pair
    wrapped = PriorInLastSteps(posterior, prior.requires_grad_(False), LAST)
    path = rollout(DIFFUSION, prior, None, BATCH, generator=seeded(3))
    weight = torch.arange(1.0, BATCH + 1, dtype=torch.float64)

    def gradient(**given):
        posterior.zero_grad()
        backward_in_chunks(DIFFUSION, wrapped, path, weight, **given)
        return posterior.weight.grad.clone()

    whole = gradient()
    assert (whole[1 : LAST + 1] == 0).all() and (whole[LAST + 1 :] != 0).all()
    torch.testing.assert_close(gradient(first=LAST + 1), whole)
    pairs = torch.combinations(torch.arange(LAST + 1, LEVELS + 1))
    chosen = [levels[:, None].expand(-1, BATCH) for levels in pairs]
    mean = torch.stack([gradient(levels=levels, first=LAST + 1) for levels in chosen]).mean(0)
    torch.testing.assert_close(mean, whole)


def test_random_levels_begin_where_asked():
    chosen = random_levels(LEVELS, 2, 3000, first=LAST + 1, generator=seeded())
    assert (chosen[0] != chosen[1]).all()
    shares = torch.bincount(chosen.flatten(), minlength=LEVELS + 1) / chosen.numel()
    wanted = torch.tensor([0, 0, 0, 1, 1, 1]) / 3
    torch.testing.assert_close(shares, wanted, atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="4 different levels out of 3"):
        random_levels(LEVELS, 4, 2, first=LAST + 1, generator=seeded())


def test_their_number_is_kept_with_the_weights(pair):
    prior, posterior = pair
    wrapped = PriorInLastSteps(posterior, prior, LAST)
    again = PriorInLastSteps(copy.deepcopy(posterior), prior)
    assert (steps_of_prior(again), steps_of_prior(posterior)) == (0, 0)
    again.load_state_dict(wrapped.state_dict())
    assert steps_of_prior(again) == LAST
    assert acting_network(wrapped) is posterior and acting_network(posterior) is posterior
