"""The rules for beta, against Gaussians, where effective sample size and divergence are known."""

import math

import pytest
import torch

from rtb_rl.core import effective_sample_size
from rtb_rl.errors import InputError
from rtb_rl.rl.posteriors.strength import (
    LARGEST,
    check_rule,
    largest_beta,
    largest_within,
    warning_of,
)


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


def test_the_strength_within_a_divergence_is_that_of_the_closed_form():
    """N(0, s^2) tilted by exp(beta a): KL = beta^2 s^2 / 2."""
    for spread in (0.2, 1.5):
        found = largest_within(lambda beta, s=spread: (beta * s) ** 2 / 2, 0.5, 0.05, 50)
        assert found == pytest.approx(1 / spread, rel=0.01) and found <= 1 / spread


def test_a_range_that_stays_within_gives_its_end_and_one_that_never_does_is_refused():
    assert largest_within(lambda beta: 0.1 * beta, 2.0, 0.3, 10.0) == 10.0
    with pytest.raises(InputError, match="3 nats from the prior at beta 0.3 already.*2 were asked"):
        largest_within(lambda beta: 10 * beta, 2.0, 0.3, 10.0)


@pytest.mark.parametrize(
    "beta, ess, kl, words",
    [
        (None, 0.0, None, "an effective sample size of 0 was asked for; give a share between 1/25"),
        (None, 1.0, None, "an effective sample size of 1 was asked for"),
        (2.0, 0.3, None, "beta 2.0 and an effective sample size of 0.3 are both given.*give one"),
        (2.0, None, 0.5, "beta 2.0 and a divergence of 0.5 nats are both given.*give one"),
        (None, 0.3, 0.5, "sample size of 0.3 and a divergence of 0.5 nats are both given"),
        (None, None, 0.0, "a divergence of 0 nats from the prior was asked for; give a positive"),
        (None, None, float("nan"), "a divergence of nan nats"),
    ],
)
def test_rules_that_contradict_or_can_t_be_kept_are_refused(beta, ess, kl, words):
    with pytest.raises(InputError, match=words):
        check_rule(beta, ess, kl)


def test_a_posterior_far_from_its_prior_is_warned_of():
    assert warning_of(1.0) is None
    assert "11.8 nats from the prior's" in str(warning_of(11.84))
