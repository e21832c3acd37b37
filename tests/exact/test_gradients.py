"""Gradient identities in one step: p_post = N(phi, 1), prior N(0, 1), log r = x.

Then grad KL(p_post || prior r / Z) = phi - 1 and log Z = 1/2. Expectations over eps ~ N(0, 1) are
taken at eps = -1 and +1, which is exact for the polynomials met here (degree 3 at most in each).
"""

import itertools

import pytest
import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    GaussianDiffusion,
    GroupMeanLogZ,
    ScalarLogZ,
    Schedule,
    Trajectory,
    backward_in_chunks,
    log_ratio,
    log_weight,
    residual,
    rollout,
    rtb_loss,
)

PHI, K = 0.3, 4
STEP = GaussianDiffusion(
    Schedule(torch.tensor([1.0, 0.0], dtype=torch.float64)),
    (1,),
    torch.ones(1),
    dtype=torch.float64,
)


class Constant(nn.Module):
    """Predicts phi everywhere."""

    def __init__(self, phi: float):
        super().__init__()
        self.phi = nn.Parameter(torch.tensor(phi, dtype=torch.float64))

    def forward(self, x: Tensor, level: Tensor, condition: object) -> Tensor:
        return self.phi.expand_as(x)


PRIOR = Constant(0.0)


def on_policy(group: int) -> Trajectory:
    """Groups of paths whose eps run through all patterns of -1 and +1: all equally likely."""
    eps = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=group)), dtype=torch.float64)
    x0 = PHI + eps.reshape(-1, 1)
    return Trajectory(torch.stack([x0, torch.zeros_like(x0)]))


def scored(trajectory: Trajectory) -> tuple[Constant, Tensor, Tensor]:
    """The posterior, the log-ratio as a leaf, and the log-weight made from it."""
    posterior = Constant(PHI)
    with torch.no_grad():
        ratio = log_ratio(STEP, posterior, PRIOR, trajectory)
    ratio.requires_grad_()
    return posterior, ratio, log_weight(trajectory.x0[:, 0], ratio, 1.0)


def gradient(posterior: Constant, trajectory: Trajectory, ratio: Tensor, loss: Tensor) -> float:
    (weight,) = torch.autograd.grad(loss, [ratio])
    posterior.zero_grad()
    backward_in_chunks(STEP, posterior, trajectory, weight)
    assert posterior.phi.grad is not None
    return float(posterior.phi.grad)


def centred(weight: Tensor) -> Tensor:
    return residual(GroupMeanLogZ(K)(None, weight), weight)


@pytest.mark.parametrize("log_z", [-30.0, 0.0, 0.5, 7.0])
def test_on_policy_gradient_is_that_of_the_kl_whatever_log_z(log_z: float):
    trajectory = on_policy(1)
    posterior, ratio, weight = scored(trajectory)
    loss = rtb_loss(residual(torch.tensor(log_z), weight)) / 2
    assert gradient(posterior, trajectory, ratio, loss) == pytest.approx(PHI - 1, abs=1e-12)


def test_on_policy_gradient_of_drawn_paths():
    n = 100_000
    trajectory = rollout(STEP, Constant(PHI), None, n, generator=Generator().manual_seed(0))
    posterior, ratio, weight = scored(trajectory)
    loss = rtb_loss(residual(torch.tensor(0.5), weight)) / 2
    eps = trajectory.x0[:, 0] - PHI
    delta = residual(torch.tensor(0.5), weight).detach()
    error = float((delta * eps).std()) / n**0.5
    assert gradient(posterior, trajectory, ratio, loss) == pytest.approx(PHI - 1, abs=4 * error)


def test_vargrad_gradient_is_that_of_the_kl_up_to_k_minus_1_over_k():
    trajectory = on_policy(K)
    posterior, ratio, weight = scored(trajectory)
    loss = rtb_loss(centred(weight)) / 2
    value = gradient(posterior, trajectory, ratio, loss)
    assert value == pytest.approx((K - 1) / K * (PHI - 1), abs=1e-12)
    assert value * K / (K - 1) == pytest.approx(-0.7, abs=1e-12)


def test_centred_residuals_are_leave_one_out_residuals():
    """K / (K - 1) (mean - l) = mean of the others - l, path by path."""
    log_weights = torch.randn(5 * K, generator=Generator().manual_seed(0), dtype=torch.float64)
    groups = log_weights.reshape(-1, K)
    others = (groups.sum(1, keepdim=True) - groups) / (K - 1)
    torch.testing.assert_close(
        centred(log_weights) * K / (K - 1), (others - groups).flatten(), rtol=1e-12, atol=1e-12
    )


def test_detaching_the_group_mean_changes_nothing():
    _, ratio, weight = scored(on_policy(K))
    detached = residual(GroupMeanLogZ(K)(None, weight.detach()), weight)
    (with_mean,) = torch.autograd.grad(rtb_loss(centred(weight)), [ratio], retain_graph=True)
    (without,) = torch.autograd.grad(rtb_loss(detached), [ratio])
    torch.testing.assert_close(with_mean, without, rtol=1e-12, atol=1e-14)


def test_gradient_in_log_z_is_the_mean_residual_and_vargrad_is_its_optimum():
    trajectory = on_policy(K)
    _, _, weight = scored(trajectory)
    log_z = ScalarLogZ().double()
    weight = weight.detach()
    delta = residual(log_z(None, weight), weight)
    (rtb_loss(delta) / 2).backward()
    torch.testing.assert_close(log_z.value.grad, delta.detach().mean())
    log_z.start_at(weight[:K])
    best = rtb_loss(residual(log_z(None, weight[:K]), weight[:K]))
    torch.testing.assert_close(best, rtb_loss(centred(weight[:K])))
