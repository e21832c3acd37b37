"""Gradients in chunks, on subsets of levels and level by level, for Gaussian and masked chains."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    Denoiser,
    Diffusion,
    GaussianDiffusion,
    IndependentReveals,
    Trajectory,
    backward_in_chunks,
    cosine_schedule,
    linear_masking,
    log_ratio,
    noise_back,
    rollout,
)
from rtb_rl.core.gaussian import large_spread
from rtb_rl.nn import LearnedReveal, LearnedSpread, ResidualMLP
from rtb_rl.tasks.toy import GaussianDenoiser, token_task

LEVELS, BATCH = 4, 6


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@dataclass(frozen=True)
class Case:
    """A posterior whose weights are not those of the prior, and paths of several origins."""

    diffusion: Diffusion
    prior: Denoiser
    posterior: nn.Module
    paths: list[Trajectory]

    def gradient(self, levels: Tensor | None = None, chunk: int | None = None) -> Tensor:
        """Gradient of sum_i (i + 1) log p_post(path i) over all paths, flat."""
        self.posterior.zero_grad()
        weight = torch.arange(1, BATCH + 1, dtype=torch.float64)
        for path in self.paths:
            backward_in_chunks(
                self.diffusion, self.posterior, path, weight, levels=levels, chunk=chunk
            )
        parameters = self.posterior.parameters()
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def moved(posterior: nn.Module) -> nn.Module:
    generator = seeded(1)
    for parameter in posterior.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(0.3 * noise)
    return posterior


def case(diffusion: Diffusion, prior: Denoiser, posterior: nn.Module, x0: Tensor) -> Case:
    posterior = moved(posterior.double())
    paths = [
        rollout(diffusion, posterior, None, BATCH, generator=seeded(2)),
        noise_back(diffusion, x0, None, generator=seeded(3)),
    ]
    return Case(diffusion, prior, posterior, paths)


def gaussian() -> Case:
    """Three coordinates; the posterior learns its mean and its spread."""
    schedule = cosine_schedule(LEVELS)
    diffusion = GaussianDiffusion(schedule, (3,), large_spread(schedule), dtype=torch.float64)
    one = torch.ones(3, dtype=torch.float64)
    prior = GaussianDenoiser(schedule, one, one / 4)
    network = ResidualMLP(3, LEVELS, width=8, blocks=1, generator=seeded())
    posterior = LearnedSpread(network, levels=LEVELS, size=3)
    x0 = torch.randn((BATCH, 3), generator=seeded(), dtype=torch.float64)
    return case(diffusion, prior, posterior, x0)


def masked() -> Case:
    """Three tokens of three, several in a step; the posterior also learns what to reveal early."""
    reveals = IndependentReveals(linear_masking(LEVELS), 3)
    task = token_task(3, 3, reveals, generator=seeded()).task
    _, x0 = task.draw_conditions(BATCH, generator=seeded())
    assert x0 is not None
    posterior = LearnedReveal(task.posterior, levels=LEVELS, length=3)
    return case(task.diffusion, task.prior, posterior, x0)


@pytest.fixture(params=[gaussian, masked], ids=["gaussian", "masked"])
def chain(request: pytest.FixtureRequest) -> Case:
    make: Callable[[], Case] = request.param
    return make()


@pytest.mark.parametrize("chunk", [1, 5, BATCH, LEVELS * BATCH, 1000])
def test_a_gradient_in_chunks_is_the_gradient(chain: Case, chunk: int):
    weight = torch.arange(1, BATCH + 1, dtype=torch.float64)
    whole = [log_ratio(chain.diffusion, chain.posterior, chain.prior, p) for p in chain.paths]
    loss = sum((weight * ratio).sum() for ratio in whole)
    assert isinstance(loss, Tensor)
    expected = torch.autograd.grad(loss, list(chain.posterior.parameters()))
    flat = torch.cat([gradient.flatten() for gradient in expected])
    assert flat.abs().max() > 1
    torch.testing.assert_close(chain.gradient(chunk=chunk), flat, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", range(1, LEVELS + 1))
def test_the_mean_over_all_subsets_of_levels_is_the_gradient(chain: Case, count: int):
    """K / count times the gradient on `count` levels, over all such subsets."""
    subsets = list(itertools.combinations(range(1, LEVELS + 1), count))
    levels = [torch.tensor(subset)[:, None].expand(-1, BATCH) for subset in subsets]
    mean = torch.stack([chain.gradient(levels=chosen) for chosen in levels]).mean(0)
    torch.testing.assert_close(mean, chain.gradient(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [None, 5])
def test_joint_evaluation_is_level_by_level_evaluation(chain: Case, chunk: int | None):
    """One batch of all levels, against differences of log-probabilities added up level by level."""
    for path in chain.paths:
        together = log_ratio(chain.diffusion, chain.posterior, chain.prior, path, chunk=chunk)
        total = torch.zeros(BATCH, dtype=torch.float64)
        for k in range(1, LEVELS + 1):
            level = torch.full((BATCH,), k)
            kernel, reference = (
                chain.diffusion.kernel(model(path.x[k], level, None), path.x[k], level)
                for model in (chain.posterior, chain.prior)
            )
            total += kernel.log_prob(path.x[k - 1]) - reference.log_prob(path.x[k - 1])
        torch.testing.assert_close(together, total, rtol=1e-9, atol=1e-9)
