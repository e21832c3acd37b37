"""DDPP-LB where the exact posterior is a product over positions: zero loss at every noisy point."""

import pytest
import torch
from torch import Generator, Tensor

from rtb_rl.core import (
    IndependentReveals,
    MaskedDiffusion,
    denoising_posterior_loss,
    linear_masking,
)

LENGTH, VOCABULARY, BETA = 3, 4, 2.0
MASK = VOCABULARY
DIFFUSION = MaskedDiffusion(LENGTH, MASK, IndependentReveals(linear_masking(5), LENGTH))


def table(seed: int) -> Tensor:
    shape = (LENGTH, VOCABULARY)
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


PRIOR, REWARD = table(0).log_softmax(1), table(1)
TILTED = PRIOR + BETA * REWARD


def log_z(x: Tensor, level: Tensor, condition: object) -> Tensor:
    """Masked positions are still open; the reward of the others is known."""
    known = BETA * torch.cat([REWARD, torch.zeros(LENGTH, 1)], 1)[torch.arange(LENGTH), x]
    return torch.where(x == MASK, TILTED.logsumexp(1), known).sum(1)


def loss(posterior: Tensor, beta: float = BETA) -> Tensor:
    x0 = torch.randint(VOCABULARY, (64, LENGTH), generator=Generator().manual_seed(2))
    log_reward = REWARD[torch.arange(LENGTH), x0].sum(1)
    return denoising_posterior_loss(
        DIFFUSION,
        lambda x, level, condition: posterior.expand(len(x), -1, -1),
        lambda x, level, condition: PRIOR.expand(len(x), -1, -1),
        log_z,
        x0,
        None,
        log_reward,
        beta,
        generator=Generator().manual_seed(3),
    )


def test_the_exact_posterior_has_zero_loss_and_no_other():
    assert float(loss(TILTED.log_softmax(1))) == pytest.approx(0.0, abs=1e-24)
    assert float(loss(PRIOR)) > 0.1
    assert float(loss(TILTED.log_softmax(1), beta=1.0)) > 0.1


def test_its_gradient_vanishes_there():
    logits = TILTED.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(logits.log_softmax(1)), [logits])
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)
