"""Objectives beside trajectory balance: identities path by path, and where each one ends."""

import pytest
import torch
from torch import Generator, Tensor

from rtb_rl.core import (
    effective_sample_size,
    elbo,
    eubo,
    importance_eubo,
    kl_reinforce_loss,
    log_variance_loss,
    published_rl_loss,
    residual,
    rtb,
    rtb_loss,
    trust_pcl_loss,
)

K = 5


def draws(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, [leaf])[0]


def test_vargrad_with_k_minus_1_is_leave_one_out_reinforce_path_by_path():
    ratio, log_reward = draws(4 * K).requires_grad_(), draws(4 * K, 1)
    weight = 2 * log_reward - ratio
    variance = gradient(log_variance_loss(weight, K), ratio)
    reinforce = gradient(kl_reinforce_loss(2 * log_reward - ratio, K), ratio)
    torch.testing.assert_close(variance, reinforce, rtol=1e-12, atol=1e-15)
    groups = weight.detach().reshape(-1, K)
    others = (groups.sum(1, keepdim=True) - groups) / (K - 1)
    by_hand = -(groups - others).flatten() / len(weight)  # descending raises log p of the good
    torch.testing.assert_close(variance, by_hand, rtol=1e-12, atol=1e-15)


def test_trust_pcl_is_alpha_squared_times_trajectory_balance():
    log_z, ratio, log_reward = draws(8), draws(8, 1), draws(8, 2)
    for alpha in (0.1, 1.0, 3.0):
        ours = rtb()(log_z, ratio, log_reward, 1 / alpha)
        published = trust_pcl_loss(log_z, ratio, log_reward, alpha)
        torch.testing.assert_close(published, alpha**2 * ours, rtol=1e-12, atol=0)
        by_hand = (alpha * log_z + alpha * ratio - log_reward).square().mean()
        torch.testing.assert_close(published, by_hand, rtol=1e-12, atol=0)


def test_rtb_as_an_objective_is_the_mean_squared_residual():
    log_z, ratio, log_reward = draws(8), draws(8, 1), draws(8, 2)
    by_hand = rtb_loss(residual(log_z, 3.0 * log_reward - ratio))
    torch.testing.assert_close(rtb()(log_z, ratio, log_reward, 3.0), by_hand)


@pytest.mark.parametrize("loss", [log_variance_loss, kl_reinforce_loss])
def test_a_group_needs_another_path_and_must_divide_the_batch(loss):
    with pytest.raises(ValueError, match="group of 1 path.* use 2 or more"):
        loss(draws(4), 1)
    with pytest.raises(ValueError, match="5 paths can't be cut into groups of 2"):
        loss(draws(5), 2)


PRIOR = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
LOG_REWARD = torch.tensor([0.1, -0.7, 0.9, 1.4], dtype=torch.float64)


def test_the_published_loss_has_the_derivatives_of_its_formula():
    ratio, log_reward = draws(6).requires_grad_(), draws(6, 1)
    found = gradient(published_rl_loss(ratio, log_reward, 0.5), ratio)
    reward = log_reward.exp()
    by_hand = (2 * 0.5 * ratio.detach() - (reward - reward.mean())) / 6
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=1e-15)


def test_bounds_enclose_log_z_and_meet_for_equal_weights():
    """ELBO and EUBO of a four-point chain, by enumeration; the gap is a KL on each side."""
    post = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.float64)
    weight = LOG_REWARD + PRIOR.log() - post.log()
    target = (PRIOR * LOG_REWARD.exp()) / (PRIOR * LOG_REWARD.exp()).sum()
    log_z = float((PRIOR * LOG_REWARD.exp()).sum().log())
    lower, upper = float((post * weight).sum()), float((target * weight).sum())
    assert lower < log_z < upper
    assert log_z - lower == pytest.approx(float((post * (post / target).log()).sum()))
    assert upper - log_z == pytest.approx(float((target * (target / post).log()).sum()))
    assert float(elbo(weight)) == pytest.approx(lower)  # post is uniform: each point once
    assert float(importance_eubo(weight)) == pytest.approx(upper)
    drawn = torch.multinomial(target, 200_000, True, generator=Generator().manual_seed(0))
    assert float(eubo(weight[drawn])) == pytest.approx(upper, abs=0.01)
    same = torch.full((7,), 1.3)
    assert float(importance_eubo(same)) == pytest.approx(1.3)
    assert float(effective_sample_size(same)) == pytest.approx(1.0)
