"""Objectives beside trajectory balance: identities path by path, and where each one ends."""

import pytest
import torch
from torch import Generator, Tensor

from rtb_rl.core import (
    effective_sample_size,
    elbo,
    eubo,
    importance_eubo,
    importance_log_z,
    kl_reinforce_loss,
    linex,
    log_variance_loss,
    published_rl_loss,
    residual,
    rtb,
    rtb_loss,
    square,
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


def forward_kl(log_probs: Tensor, target: Tensor) -> Tensor:
    return (target.exp() * (target - log_probs)).sum()


def reverse_kl(log_probs: Tensor, target: Tensor) -> Tensor:
    return (log_probs.exp() * (log_probs - target)).sum()


@pytest.mark.parametrize(
    ("penalty", "divergence"), [(linex(10.0), forward_kl), (square, reverse_kl)]
)
def test_on_policy_linex_descends_the_forward_kl_and_squares_the_reverse(penalty, divergence):
    logits = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64, requires_grad=True)
    target = (PRIOR.log() + LOG_REWARD).log_softmax(0)
    log_z = (PRIOR.log() + LOG_REWARD).logsumexp(0)
    expected = 2 * gradient(divergence(logits.log_softmax(0), target), logits)
    log_probs = logits.log_softmax(0)
    ratio = (log_probs - PRIOR.log()).detach().requires_grad_()
    slope = gradient(penalty(residual(log_z, LOG_REWARD - ratio)).sum(), ratio)
    found = gradient((log_probs.detach().exp() * slope * log_probs).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_linex_is_a_square_near_zero_and_linear_beyond_its_limit():
    small = torch.tensor([-1e-4, 1e-4], dtype=torch.float64)
    torch.testing.assert_close(linex(3.0)(small), small.square(), rtol=1e-3, atol=0)
    far = torch.tensor([-3.0, -4.0, -5.0, 50.0, 51.0], dtype=torch.float64)
    steps = linex(3.0)(far).diff()
    assert float(steps[0]) == pytest.approx(float(steps[1]))
    assert float(steps[3]) == pytest.approx(2.0)


def test_the_best_log_z_of_linex_is_the_importance_weighted_one():
    weight = draws(50)
    log_z = importance_log_z(weight)[0].requires_grad_()
    slope = gradient(rtb_loss(residual(log_z, weight), linex(20.0)), log_z)
    assert float(slope) == pytest.approx(0.0, abs=1e-12)


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
