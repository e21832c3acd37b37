"""Where the code published with arXiv 2405.20971 departs from the paper: the toy of 25 modes.

Rows 15 and 16 of the list that test_published_mistakes.py begins.
"""

import importlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Generator, Tensor

from rtb_rl.core import (
    GaussianKernel,
    kl_reinforce_loss,
    objective,
    published_rl_loss,
    rollout_against,
)
from rtb_rl.tasks.toy import SCALE, gaussian_chain, linear_reward, shared_spread


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def test_row_15_covariance_and_exploration_of_the_toy(catches):
    """Toy: covariance I in the paper, 0.3 I in the code; exploration added alike to every step."""
    one, posterior = torch.ones(1).double(), shared_spread(generator=seeded())
    nine = importlib.import_module("rtb_rl.tasks.toy.nine_of_twenty_five")

    def modes_have_the_covariance_of_the_code():
        mixture = nine.twenty_five()
        inside = 0.3 * torch.eye(2, dtype=torch.float64).expand(25, 2, 2)
        torch.testing.assert_close(SCALE**2 * mixture.covariances, inside)
        between = (mixture.weights[:, None] * mixture.means**2).sum(0)
        torch.testing.assert_close(between + 0.3 / SCALE**2, torch.ones_like(between))

    catches(modes_have_the_covariance_of_the_code, nine, "VARIANCE", 1.0)

    def widening_does_not_grow_with_the_number_of_levels():
        for levels in (4, 40):
            # A chain that forgets x[K]: its steps alone make the variance of x[0].
            task = gaussian_chain(
                one, one / 4, linear_reward(one), levels=levels, posterior=posterior
            ).task
            path, _ = rollout_against(
                task.diffusion, task.prior, task.prior, None, 4000, widening=2.0, generator=seeded()
            )
            share = path.x0.var(0) / 0.25
            torch.testing.assert_close(share, torch.full((1,), 4.0), rtol=0.1, atol=0)

    def alike(self: GaussianKernel, factor: float) -> GaussianKernel:
        return GaussianKernel(self.mean, (self.std**2 + 0.25).sqrt())

    catches(widening_does_not_grow_with_the_number_of_levels, GaussianKernel, "widened", alike)


def policy_gradient(
    loss: Callable[[Tensor, Tensor], Tensor], law: Tensor, prior: Tensor, log_reward: Tensor
) -> Tensor:
    """Expected gradient of a loss (log_ratio, log_reward) by the logits of a law on n points.

    Every pair of points is a group, with its probability.
    """
    pairs = torch.cartesian_prod(torch.arange(len(law)), torch.arange(len(law)))
    ratio = (law / prior).log()[pairs.flatten()].requires_grad_()
    (slope,) = torch.autograd.grad(loss(ratio, log_reward[pairs.flatten()]), [ratio])
    mass = law[pairs].prod(1).repeat_interleave(2) * slope * len(pairs)
    by_point = torch.zeros_like(law).index_add(0, pairs.flatten(), mass)
    return by_point - law * by_point.sum()


def test_row_16_reinforce_on_log_r(catches):
    """Toy RL baseline: reward r and a squared log-ratio, whose optimum is never the posterior."""
    prior = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    log_reward = torch.tensor([0.1, -0.7, 0.9, 1.4], dtype=torch.float64)
    posterior = (prior.log() + log_reward).softmax(0)

    def kl_reinforce(ratio: Tensor, log_reward: Tensor) -> Tensor:
        return kl_reinforce_loss(objective.log_weight(log_reward, ratio, 1.0), 2)

    def stationary_at_the_posterior():
        assert policy_gradient(kl_reinforce, posterior, prior, log_reward).abs().max() < 1e-12
        assert policy_gradient(kl_reinforce, prior, prior, log_reward).abs().max() > 0.05

    def on_r(log_reward: Tensor, log_ratio: Tensor, beta: float) -> Tensor:
        return log_reward.exp() - log_ratio

    catches(stationary_at_the_posterior, objective, "log_weight", on_r)

    grid = torch.full((25,), 1 / 25, dtype=torch.float64)
    wanted = torch.tensor([4, 10, 4, 5, 10, 5, 4, 15, 4] + 16 * [0], dtype=torch.float64) / 61
    for weight, distance in ((0.3, 0.69), (0.5, 0.51), (1.0, 0.31)):
        optimum = (25 * wanted / (2 * weight)).softmax(0)
        published = partial(published_rl_loss, weight=weight)
        slope = policy_gradient(published, optimum, grid, (25 * wanted).log())
        assert slope.abs().max() < 1e-12
        assert (optimum - wanted).abs().sum() / 2 == pytest.approx(distance, abs=0.005)
