"""The rule for beta, against Gaussians, where the effective sample size is known."""

import math

import pytest
import torch

from rtb_rl.core import effective_sample_size
from rtb_rl.errors import InputError
from rtb_rl.rl.posteriors.strength import LARGEST, check_share, largest_beta


def test_of_gaussian_rewards_beta_is_that_of_the_closed_form():
    """r ~ N(0, s^2): ESS = exp(-beta^2 s^2), so beta = sqrt(-log share) / s."""
    generator = torch.Generator().manual_seed(0)
    for spread in (0.1, 3.0):
        rewards = spread * torch.randn(4, 200_000, generator=generator, dtype=torch.float64)
        for share in (0.5, 0.8):
            expected = math.sqrt(-math.log(share)) / spread
            assert largest_beta(rewards, share) == pytest.approx(expected, rel=0.01)


def test_the_share_is_met_and_a_constant_of_a_state_changes_nothing():
    rewards = torch.rand(16, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    beta = largest_beta(rewards, 0.3)
    assert effective_sample_size(beta * rewards).mean() == pytest.approx(0.3, abs=1e-6)
    shifted = rewards + 100 * torch.arange(16)[:, None]
    assert largest_beta(shifted, 0.3) == pytest.approx(beta, rel=1e-6)


def test_where_the_critic_does_not_tell_actions_apart_the_bound_is_returned():
    assert largest_beta(torch.zeros(2, 8, dtype=torch.float64), 0.5) == LARGEST


@pytest.mark.parametrize(
    "share, beta, words",
    [
        (0.0, None, "an effective sample size of 0 was asked for; give a share between 1/256"),
        (1.0, None, "an effective sample size of 1 was asked for"),
        (0.3, 2.0, "beta 2 and an effective sample size of 0.3 are both given.*give one"),
    ],
)
def test_shares_that_can_t_be_kept_are_refused(share, beta, words):
    with pytest.raises(InputError, match=words):
        check_share(share, beta)
