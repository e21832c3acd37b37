"""The objective: penalties, gradients in chunks and on subsets, and what log-weights say."""

import itertools
import math
import re

import pytest
import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    Denoiser,
    GaussianDiffusion,
    ScaledPrediction,
    Trajectory,
    backward_in_chunks,
    cosine_schedule,
    effective_sample_size,
    elbo,
    huber,
    importance_log_z,
    linex,
    log_ratio,
    log_weight,
    penalty_of,
    random_levels,
    residual,
    rollout_against,
    rtb,
    rtb_loss,
    square,
)
from rtb_rl.core.alternatives import published_rl_loss, trust_pcl_loss
from rtb_rl.core.gaussian import large_spread
from rtb_rl.core.protocols import Condition

K, BATCH = 4, 5


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


class Network(nn.Module):
    """tanh of a random linear map of x, level and condition; counts the rows of each call."""

    def __init__(self, seed: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn((4, 2), generator=seeded(seed), dtype=torch.float64))
        self.rows: list[int] = []

    def forward(self, x: Tensor, level: Tensor, condition: Tensor) -> Tensor:
        self.rows.append(len(x))
        return torch.cat([x, level[:, None] / K, condition], 1).tanh() @ self.weight


SCHEDULE = cosine_schedule(K)
DIFFUSION = GaussianDiffusion(SCHEDULE, (2,), large_spread(SCHEDULE), dtype=torch.float64)
CONDITION = torch.linspace(-1, 1, BATCH, dtype=torch.float64)[:, None]


def setting() -> tuple[Network, Network, Trajectory, Tensor]:
    """Posterior, prior, paths of the posterior and their log-ratio."""
    posterior, prior = Network(1), Network(2)
    trajectory, ratio = rollout_against(
        DIFFUSION, posterior, prior, CONDITION, BATCH, generator=seeded(3)
    )
    posterior.rows.clear()
    return posterior, prior, trajectory, ratio


def gradient(levels: Tensor | None = None, chunk: int | None = None) -> Tensor:
    """Gradient of the sum of (path index + 1) log p_post(path), by chunks."""
    posterior, _, trajectory, _ = setting()
    weight = torch.arange(1, BATCH + 1, dtype=torch.float64)
    backward_in_chunks(DIFFUSION, posterior, trajectory, weight, levels=levels, chunk=chunk)
    assert posterior.weight.grad is not None
    return posterior.weight.grad


def with_own_spread(network: Network) -> Denoiser:
    def denoise(x: Tensor, level: Tensor, condition: Condition) -> ScaledPrediction:
        output = network(x, level, condition)
        return ScaledPrediction(output, output.sin() / 4)

    return denoise


@pytest.mark.parametrize("wrap", [lambda network: network, with_own_spread])
@pytest.mark.parametrize("penalty", [torch.square, huber(0.5)])
@pytest.mark.parametrize("chunk", [None, 1, 3, BATCH, K * BATCH, 99])
def test_backward_in_chunks_is_backward_through_the_loss(chunk, penalty, wrap):
    network, prior, trajectory, _ = setting()
    posterior = wrap(network)
    log_reward, log_z = trajectory.x0.sum(1), torch.tensor(0.3, dtype=torch.float64)
    whole = log_ratio(DIFFUSION, posterior, prior, trajectory)
    loss = rtb_loss(residual(log_z, log_weight(log_reward, whole, 2.0)), penalty)
    (expected,) = torch.autograd.grad(loss, [network.weight])

    ratio = whole.detach().requires_grad_()
    delta = residual(log_z, log_weight(log_reward, ratio, 2.0))
    rtb_loss(delta, penalty).backward()
    assert ratio.grad is not None
    backward_in_chunks(DIFFUSION, posterior, trajectory, ratio.grad, chunk=chunk)
    torch.testing.assert_close(network.weight.grad, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_mean_over_all_subsets_of_levels_is_the_full_gradient(count):
    """Subset by subset scaled by K / count inside; here path i uses the subset shifted by i."""
    subsets = list(itertools.combinations(range(K), count))
    gradients = []
    for subset in subsets:
        levels = (torch.tensor(subset)[:, None] + torch.arange(BATCH)) % K + 1
        gradients.append(gradient(levels=levels, chunk=3))
    torch.testing.assert_close(torch.stack(gradients).mean(0), gradient())


def test_gradients_are_added_to_those_that_are_there():
    posterior, _, trajectory, _ = setting()
    weight = torch.arange(1, BATCH + 1, dtype=torch.float64)
    for _ in range(2):
        backward_in_chunks(DIFFUSION, posterior, trajectory, weight)
    torch.testing.assert_close(posterior.weight.grad, 2 * gradient())


@pytest.mark.parametrize("levels", [4, 32])
def test_rows_evaluated_at_once_do_not_grow_with_the_number_of_levels(levels):
    schedule, chunk = cosine_schedule(levels), 7
    diffusion = GaussianDiffusion(schedule, (2,), large_spread(schedule), dtype=torch.float64)
    posterior, prior = Network(1), Network(2)
    trajectory, _ = rollout_against(
        diffusion, posterior, prior, CONDITION, BATCH, generator=seeded()
    )
    posterior.rows.clear()
    backward_in_chunks(diffusion, posterior, trajectory, torch.ones(BATCH), chunk=chunk)
    assert max(posterior.rows) == chunk and sum(posterior.rows) == levels * BATCH
    posterior.rows.clear()
    few = random_levels(levels, 2, BATCH, generator=seeded())
    backward_in_chunks(diffusion, posterior, trajectory, torch.ones(BATCH), levels=few)
    assert sum(posterior.rows) == 2 * BATCH


def test_gradient_never_reaches_prior_reward_or_states():
    posterior, prior, trajectory, ratio = setting()
    reward = nn.Parameter(torch.ones(2, dtype=torch.float64))
    with torch.no_grad():
        log_reward = trajectory.x0 @ reward
    prior.rows.clear()
    ratio.requires_grad_()
    rtb_loss(residual(torch.tensor(0.0), log_weight(log_reward, ratio, 1.0))).backward()
    assert ratio.grad is not None
    backward_in_chunks(DIFFUSION, posterior, trajectory, ratio.grad)
    assert posterior.weight.grad is not None
    assert prior.weight.grad is None and reward.grad is None and trajectory.x.grad is None
    assert not prior.rows  # the prior isn't even evaluated again


def test_random_levels_are_distinct_and_uniform():
    draws, levels, count = 20_000, 7, 3
    chosen = random_levels(levels, count, draws, generator=seeded())
    assert chosen.shape == (count, draws) and chosen.dtype == torch.int64
    assert bool((chosen.sort(0).values.diff(dim=0) > 0).all())
    for row in chosen:
        share = torch.bincount(row, minlength=levels + 1)[1:] / draws
        error = math.sqrt((1 / levels) * (1 - 1 / levels) / draws)
        assert bool(((share - 1 / levels).abs() < 4.5 * error).all())
    every = random_levels(levels, levels, 4, generator=seeded()).sort(0).values
    assert torch.equal(every, torch.arange(1, 8)[:, None].expand(7, 4))


@pytest.mark.parametrize("count", [0, 8])
def test_impossible_numbers_of_levels_are_refused(count):
    with pytest.raises(ValueError, match=f"{count} different levels out of 7"):
        random_levels(7, count, 2, generator=seeded())


def test_residual_of_a_path():
    weight = log_weight(torch.tensor([2.0]), torch.tensor([0.5]), 3.0)
    assert weight.item() == 5.5
    assert residual(torch.tensor([1.0]), weight).item() == -4.5
    assert rtb_loss(torch.tensor([-4.5, 1.5])).item() == (20.25 + 2.25) / 2


@pytest.mark.parametrize(
    ("reward", "ratio"),
    [((5, 1), (5,)), ((5,), (5, 1)), ((1, 5), (5,)), ((4,), (5,)), ((1,), (5,))],
)
def test_a_reward_of_another_shape_than_the_log_ratio_is_refused(reward, ratio):
    """[n, 1] against [n] would be [n, n]: every reward with every path."""
    shapes = rf"{re.escape(str(reward))} and log-ratios {re.escape(str(ratio))}"
    for objective in (
        log_weight,
        lambda reward, ratio, beta: rtb()(torch.zeros(()), ratio, reward, beta),
        lambda reward, ratio, alpha: published_rl_loss(ratio, reward, alpha),
        lambda reward, ratio, alpha: trust_pcl_loss(torch.zeros(()), ratio, reward, alpha),
    ):
        with pytest.raises(ValueError, match=shapes):
            objective(torch.zeros(reward), torch.zeros(ratio), 1.0)


@pytest.mark.parametrize(("log_z", "weight"), [((5, 1), (5,)), ((4,), (5,)), ((3, 1), (2, 5))])
def test_a_log_z_that_makes_more_residuals_than_there_are_paths_is_refused(log_z, weight):
    shapes = rf"{re.escape(str(log_z))} and log-weights {re.escape(str(weight))}"
    with pytest.raises(ValueError, match=shapes):
        residual(torch.zeros(log_z), torch.zeros(weight))


def test_axes_in_front_and_one_log_z_for_several_paths_are_fine():
    weight = log_weight(torch.ones(2, 5), torch.zeros(2, 5), 3.0)
    assert torch.equal(weight, torch.full((2, 5), 3.0))
    assert torch.equal(log_weight(torch.ones(()), torch.zeros(5), 3.0), torch.full((5,), 3.0))
    for log_z in (torch.ones(()), torch.ones(1), torch.ones(2, 1), torch.ones(5), torch.ones(2, 5)):
        assert torch.equal(residual(log_z, weight), torch.full((2, 5), -2.0))


def test_huber_is_the_square_then_a_line_of_the_same_slope():
    delta = torch.tensor([-5.0, -2.0, 0.5, 2.0, 7.0], requires_grad=True)
    values = huber(2.0)(delta)
    torch.testing.assert_close(values, torch.tensor([16.0, 4.0, 0.25, 4.0, 24.0]))
    values.sum().backward()
    torch.testing.assert_close(delta.grad, torch.tensor([-4.0, -4.0, 1.0, 4.0, 4.0]))


def test_effective_sample_size_of_two_weights():
    weights = torch.tensor([3.0, 1.0], dtype=torch.float64)
    expected = (3 + 1) ** 2 / (2 * (9 + 1))
    ess = effective_sample_size(torch.stack([weights.log(), weights.log() + 5000]))
    torch.testing.assert_close(ess, torch.full((2,), expected, dtype=torch.float64))


def test_effective_sample_size_lies_between_one_path_and_all_of_them():
    log_weights = torch.randn((50, 20), generator=seeded(), dtype=torch.float64) * 5
    ess = effective_sample_size(log_weights)
    assert bool((ess >= 1 / 20).all()) and bool((ess <= 1).all())
    assert effective_sample_size(torch.full((20,), -7.0)).item() == pytest.approx(1, abs=1e-5)
    one = torch.full((20,), -1e4, dtype=torch.float64)
    one[3] = 0.0
    assert effective_sample_size(one).item() == pytest.approx(1 / 20)


def test_importance_log_z_of_two_weights():
    weights = torch.tensor([3.0, 1.0], dtype=torch.float64)
    log_z, error = importance_log_z(weights.log() + 1000)
    assert log_z.item() == pytest.approx(1000 + math.log(2), rel=1e-14)
    assert error.item() == pytest.approx(math.sqrt(2) / 2 / math.sqrt(2))
    assert elbo(weights.log()).item() == pytest.approx(math.log(3) / 2)


def test_elbo_is_at_most_the_importance_weighted_estimate():
    log_weights = torch.randn((30, 10), generator=seeded(), dtype=torch.float64)
    assert bool((elbo(log_weights) <= importance_log_z(log_weights)[0]).all())


@pytest.mark.parametrize(
    ("given", "wanted"),
    [((None, None), square), ((5.0, None), huber(5.0)), ((None, 3.0), linex(3.0))],
)
def test_a_penalty_is_what_its_settings_name(given, wanted):
    residuals = torch.linspace(-9, 9, 37, dtype=torch.float64)
    assert torch.equal(penalty_of(*given)(residuals), wanted(residuals))
    both = penalty_of(5.0, 3.0)(residuals)
    torch.testing.assert_close(both, huber(5.0)(residuals) + linex(3.0)(residuals))
