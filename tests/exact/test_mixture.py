"""Gaussian mixtures: the chain of the analytic denoiser, and a tilt by exp(b . x) learnt by RTB."""

import pytest
import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    GaussianDiffusion,
    Sampler,
    ScalarLogZ,
    Schedule,
    backward_in_chunks,
    cosine_schedule,
    importance_log_z,
    log_weight,
    residual,
    rollout_against,
    rtb_loss,
    zero_terminal_signal,
)
from rtb_rl.core.gaussian import large_spread
from rtb_rl.core.protocols import Condition
from rtb_rl.tasks.toy import GaussianMixture, weight_error

VARIANCES = torch.tensor([0.1, 0.15, 0.2], dtype=torch.float64)
DATA = GaussianMixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    torch.tensor([[-2.0, 0.0], [1.0, 1.5], [2.0, -1.5]], dtype=torch.float64),
    VARIANCES[:, None, None] * torch.eye(2, dtype=torch.float64),
)
SLOPE = torch.tensor([0.5, 0.4], dtype=torch.float64)


def chain_of_levels(levels: int) -> tuple[Schedule, GaussianDiffusion]:
    schedule = zero_terminal_signal(cosine_schedule(levels))
    return schedule, GaussianDiffusion(schedule, (2,), large_spread(schedule), dtype=torch.float64)


SCHEDULE, CHAIN = chain_of_levels(40)


def distance(first: Tensor, second: Tensor) -> float:
    """Total variation."""
    return float((first - second).abs().sum() / 2)


def test_the_chain_of_the_analytic_denoiser_finds_the_modes():
    sampler = Sampler(CHAIN, DATA.denoiser(SCHEDULE))
    x = sampler.sample(None, 10_000, generator=Generator().manual_seed(1))
    assert weight_error(x, DATA)["tv"] < 0.02


def test_the_residual_left_at_the_ideal_posterior_falls_with_the_number_of_levels():
    """The tilted steps have the prior's spread and shape only in the limit of many levels."""
    tilted, exact = DATA.tilted(SLOPE)
    spread = []
    for levels in (5, 20, 80):
        schedule, diffusion = chain_of_levels(levels)
        path, ratio = rollout_against(
            diffusion,
            tilted.denoiser(schedule),
            DATA.denoiser(schedule),
            None,
            2000,
            generator=Generator().manual_seed(4),
        )
        spread.append(residual(exact, log_weight(path.x0 @ SLOPE, ratio, 1.0)).std().item())
    assert spread[0] > 1.5 * spread[1] > 2.2 * spread[2]


class LearnedMixture(nn.Module):
    """The denoiser of a mixture whose weights and means are learnt; they start at the prior's."""

    def __init__(self):
        super().__init__()
        self.log_weights = nn.Parameter(DATA.weights.log())
        self.means = nn.Parameter(DATA.means.clone())

    def denoiser(self) -> nn.Module:
        means, weights = self.means, self.log_weights.softmax(0)
        return GaussianMixture(weights, means, DATA.covariances).denoiser(SCHEDULE)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        return self.denoiser()(x, level, condition)


def train(posterior: LearnedMixture, log_z: ScalarLogZ, updates: int):
    """RTB with on-policy paths and a learned log Z, log r = SLOPE . x."""
    generator, prior = Generator().manual_seed(2), DATA.denoiser(SCHEDULE)
    optimiser = torch.optim.Adam([*posterior.parameters(), *log_z.parameters()], lr=0.05)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, total_iters=updates)
    for step in range(updates):
        fixed = posterior.denoiser()
        path, ratio = rollout_against(CHAIN, fixed, prior, None, 64, generator=generator)
        weight = log_weight(path.x0 @ SLOPE, ratio.requires_grad_(), 1.0)
        if step == 0:
            log_z.start_at(weight.detach())
        optimiser.zero_grad()
        rtb_loss(residual(log_z(None, weight), weight)).backward()
        assert ratio.grad is not None
        backward_in_chunks(CHAIN, posterior, path, ratio.grad)
        optimiser.step()
        decay.step()


def test_a_tilted_mixture_is_learnt_with_its_weights():
    posterior, log_z = LearnedMixture(), ScalarLogZ().double()
    train(posterior, log_z, 150)
    tilted, exact = DATA.tilted(SLOPE)
    path, ratio = rollout_against(
        CHAIN,
        posterior,
        DATA.denoiser(SCHEDULE),
        None,
        5000,
        generator=Generator().manual_seed(3),
    )
    assert distance(DATA.weights, tilted.weights) > 0.2
    assert weight_error(path.x0, tilted)["tv"] < 0.03
    mean = (tilted.weights[:, None] * tilted.means).sum(0)
    assert (path.x0.mean(0) - mean).abs().max() < 0.1
    estimate, _ = importance_log_z(log_weight(path.x0 @ SLOPE, ratio, 1.0))
    assert estimate.item() == pytest.approx(float(exact), abs=0.04)
    assert log_z.value.item() == pytest.approx(float(exact), abs=0.15)
