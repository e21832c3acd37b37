"""GaussianKernel against torch.distributions, and the precision of its log-ratio."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from rtb_rl.core import GaussianKernel
from rtb_rl.core.kernels import exponential_race


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def difference(kernel: GaussianKernel, other: GaussianKernel, x: Tensor) -> Tensor:
    return kernel.log_prob(x) - other.log_prob(x)


@pytest.mark.parametrize("event", [(1,), (3,), (2, 4, 4)])
@pytest.mark.parametrize("per_coordinate", [False, True])
def test_log_prob_is_that_of_independent_normals(event, per_coordinate):
    mean, x = draw(1, 5, *event), draw(2, 5, *event)
    std = draw(3, 5, *(event if per_coordinate else [1] * len(event))).exp()
    expected = Normal(mean, std.expand_as(mean)).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(GaussianKernel(mean, std).log_prob(x), expected)


positive = st.floats(0.1, 10)
number = st.floats(-20, 20)


@given(number, number, number, positive, positive)
@settings(max_examples=200)
def test_log_ratio_is_the_difference_of_log_probs(mean, other_mean, x, std, other_std):
    values = [torch.full((1, 2), v, dtype=torch.float64) for v in (mean, other_mean, x)]
    kernel = GaussianKernel(values[0], torch.tensor([[std]], dtype=torch.float64))
    for spread in (std, other_std):
        other = GaussianKernel(values[1], torch.tensor([[spread]], dtype=torch.float64))
        scale = max(1.0, float(kernel.log_prob(values[2]).abs() + other.log_prob(values[2]).abs()))
        error = kernel.log_ratio(other, values[2]) - difference(kernel, other, values[2])
        assert abs(float(error)) < 1e-10 * scale


@given(number, number, number, positive, positive)
@settings(max_examples=100)
def test_log_ratio_changes_sign_when_the_kernels_change_places(mean, other_mean, x, std, other_std):
    point = torch.tensor([[x]], dtype=torch.float64)
    kernel, other = (
        GaussianKernel(
            torch.tensor([[m]], dtype=torch.float64), torch.tensor([[s]], dtype=torch.float64)
        )
        for m, s in ((mean, std), (other_mean, other_std))
    )
    forth, back = kernel.log_ratio(other, point), other.log_ratio(kernel, point)
    scale = 1 + float(kernel.log_prob(point).abs() + other.log_prob(point).abs())
    assert float((forth + back).abs()) < 1e-10 * scale


@given(number, number, positive, st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_equal_kernels_have_log_ratio_exactly_zero(mean, x, std, dtype):
    same = [
        GaussianKernel(torch.full((1, 3), mean, dtype=dtype), torch.full((1, 1), std, dtype=dtype))
        for _ in range(2)
    ]
    assert same[0].log_ratio(same[1], torch.full((1, 3), x, dtype=dtype)).item() == 0


@given(st.floats(1e-7, 1e-3), number)
def test_log_ratio_vanishes_smoothly_with_the_difference_of_spreads(gap, z):
    """d/ds of log N(z; 0, s^2) at s = 1 is z^2 - 1."""
    x = torch.tensor([[z]], dtype=torch.float64)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    gap = (1 + gap) - 1  # as it is stored
    ratio = GaussianKernel(zero, one + gap).log_ratio(GaussianKernel(zero, one), x).item()
    assert ratio == pytest.approx((z**2 - 1) * gap, abs=3 * (z**2 + 1) * gap**2)


@pytest.mark.parametrize("equal_spreads", [True, False])
def test_product_form_beats_the_difference_of_log_densities_at_16384_dimensions(equal_spreads):
    dims, std = 16_384, torch.tensor([[0.1]])
    mean = draw(1, 64, dims, dtype=torch.float32)
    other_mean = mean + 1e-3 * draw(2, 64, dims, dtype=torch.float32)
    x = mean + std * draw(3, 64, dims, dtype=torch.float32)
    other_std = std if equal_spreads else std * 1.0001
    kernel, other = GaussianKernel(mean, std), GaussianKernel(other_mean, other_std)
    exact = difference(
        GaussianKernel(mean.double(), std.double()),
        GaussianKernel(other_mean.double(), other_std.double()),
        x.double(),
    )
    error = (kernel.log_ratio(other, x) - exact).square().mean().sqrt()
    naive = (difference(kernel, other, x) - exact).square().mean().sqrt()
    assert error < 2e-4
    assert naive > 5 * error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_scored_in_float32(dtype):
    mean, other_mean, x = (draw(seed, 4, 8192).to(dtype) for seed in (1, 2, 3))
    std = torch.full((4, 1), 0.25, dtype=dtype)
    kernel, other = GaussianKernel(mean, std), GaussianKernel(other_mean, std)
    expected = Normal(mean.double(), 0.25).log_prob(x.double()).sum(1)
    other_expected = Normal(other_mean.double(), 0.25).log_prob(x.double()).sum(1)
    assert kernel.log_prob(x).dtype == kernel.log_ratio(other, x).dtype == torch.float32
    torch.testing.assert_close(kernel.log_prob(x).double(), expected, rtol=1e-5, atol=0)
    ratio = kernel.log_ratio(other, x).double()
    torch.testing.assert_close(ratio, expected - other_expected, rtol=1e-4, atol=0.05)


def test_half_precision_numbers_are_scored_in_float32_under_autocast():
    mean, x = draw(1, 4, 512, dtype=torch.float32), draw(2, 4, 512, dtype=torch.float32)
    kernel, other = GaussianKernel(mean, torch.ones(1)), GaussianKernel(mean + 0.1, torch.ones(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = kernel.log_prob(x), kernel.log_ratio(other, x)
    torch.testing.assert_close(inside, (kernel.log_prob(x), kernel.log_ratio(other, x)))


def test_samples_have_the_kernel_s_mean_and_spread():
    n = 40_000
    mean = torch.tensor([1.5, -2.0], dtype=torch.float64).expand(n, 2)
    std = torch.tensor([[0.3, 2.0]], dtype=torch.float64)
    x = GaussianKernel(mean, std).sample(generator=torch.Generator().manual_seed(0))
    assert bool(((x.mean(0) - mean[0]).abs() < 4 * std[0] / math.sqrt(n)).all())
    assert bool(((x.std(0) / std[0] - 1).abs() < 4 / math.sqrt(2 * n)).all())


def test_gradient_reaches_the_mean_and_samples_carry_no_graph():
    mean = draw(1, 3, 2).requires_grad_()
    kernel = GaussianKernel(mean, torch.ones(1, dtype=torch.float64))
    x = kernel.sample(generator=torch.Generator().manual_seed(0))
    assert not x.requires_grad
    kernel.log_prob(x).sum().backward()
    torch.testing.assert_close(mean.grad, x - mean.detach())


def test_tokens_of_nan_are_refused_not_drawn_as_token_0():
    log_probs = torch.tensor([[0.0, -torch.inf], [torch.nan, 0.0]])
    with pytest.raises(ValueError, match="NaN for the log-probabilities"):
        exponential_race(log_probs, generator=torch.Generator().manual_seed(0))
