"""GaussianDiffusion against Bayes' rule, and its spreads against what they promise."""

import math
import warnings

import pytest
import torch
from torch import Generator, Tensor

from rtb_rl.core import (
    GaussianDiffusion,
    GaussianKernel,
    ScaledPrediction,
    Schedule,
    cosine_schedule,
    linear_schedule,
    vp_schedule,
    zero_terminal_signal,
)
from rtb_rl.core.gaussian import calibrated_spread, large_spread, small_spread

SCHEDULES = [
    linear_schedule(30),
    cosine_schedule(7),
    vp_schedule(4),
    zero_terminal_signal(vp_schedule(5)),
]


def bayes_step(schedule: Schedule, level: int, x0: Tensor, x: Tensor) -> tuple[Tensor, float]:
    """Mean and variance of q(x[level-1] | x[level], x0), by adding precisions."""
    signal, keep = schedule.signal[level - 1], 1 - schedule.step_variance[level]
    before = float(1 / schedule.noise[level - 1] ** 2)
    transition = float(keep / schedule.step_variance[level])
    precision = before + transition
    mean = (before * signal * x0 + transition * x / keep.sqrt().clamp(min=1e-300)) / precision
    return mean, 1 / precision


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_kernel_at_the_true_x0_is_the_bayes_posterior(schedule: Schedule):
    generator = Generator().manual_seed(0)
    diffusion = GaussianDiffusion(
        schedule, (3,), small_spread(schedule, floor=1e-12), dtype=torch.float64
    )
    x0, x = (torch.randn((2, 3), generator=generator, dtype=torch.float64) for _ in range(2))
    for level in range(2, schedule.levels + 1):
        kernel = diffusion.kernel(x0, x, torch.full((2,), level))
        mean, variance = bayes_step(schedule, level, x0, x)
        torch.testing.assert_close(kernel.mean, mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            kernel.std, torch.full_like(kernel.std, math.sqrt(variance)), rtol=1e-9, atol=0
        )
    first = diffusion.kernel(x0, x, torch.ones(2, dtype=torch.int64))
    torch.testing.assert_close(first.mean, x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_spreads(schedule: Schedule):
    large, small = large_spread(schedule), small_spread(schedule, floor=0.02)
    ratio = schedule.signal[1:] / schedule.signal[:-1]
    torch.testing.assert_close(large**2, 1 - ratio**2)
    assert small[0] == 0.02
    assert bool((small >= 0.02).all()) and bool((small[1:] <= large[1:].clamp(min=0.02)).all())


def test_the_step_from_no_signal_forgets_the_noise():
    schedule = zero_terminal_signal(cosine_schedule(5))
    diffusion = GaussianDiffusion(schedule, (1,), large_spread(schedule))
    level, x0 = torch.full((2,), 5), torch.ones(2, 1)
    kernel = diffusion.kernel(x0, torch.tensor([[-3.0], [4.0]]), level)
    assert kernel.mean[0] == kernel.mean[1] == schedule.signal[4].float()
    assert diffusion.signal_left == 0


def test_denoising_loss_is_the_squared_error_of_the_velocity():
    schedule, generator = vp_schedule(5), Generator().manual_seed(0)
    diffusion = GaussianDiffusion(schedule, (3,), large_spread(schedule), dtype=torch.float64)
    x0, eps, guess = (
        torch.randn((5, 3), generator=generator, dtype=torch.float64) for _ in range(3)
    )
    level = torch.arange(1, 6)
    signal, noise = schedule.signal[level, None], schedule.noise[level, None]
    x, velocity = signal * x0 + noise * eps, signal * eps - noise * x0
    prediction = signal * x - noise * guess
    expected = (guess - velocity).square().mean(1)
    torch.testing.assert_close(diffusion.denoising_loss(prediction, x0, x, level), expected)


def final_variance(diffusion: GaussianDiffusion, slope: Tensor) -> float:
    """Variance at the end of the chain whose denoiser is slope[level] x + constant."""
    variance = 1.0
    for k in range(diffusion.levels, 0, -1):
        one = torch.ones((1, 1), dtype=torch.float64)
        kernel = diffusion.kernel(slope[k] * one, one, torch.tensor([k]))
        variance = float(kernel.mean**2 * variance + kernel.std**2)
    return variance


def test_calibrated_spread_makes_a_short_chain_of_gaussian_data_exact():
    schedule, rows = cosine_schedule(5), 40_000
    signal, noise = schedule.signal, schedule.noise
    slope = signal * 0.25 / (signal**2 * 0.25 + noise**2)  # of E[x0 | x] for data N(1, 0.25)
    constant = 1 - slope * signal
    small = GaussianDiffusion(
        schedule, (1,), small_spread(schedule, floor=1e-3), dtype=torch.float64
    )
    assert final_variance(small, slope) == pytest.approx(0.108, abs=5e-4)

    generator = Generator().manual_seed(0)
    x0 = 1 + 0.5 * torch.randn((rows, 1), generator=generator, dtype=torch.float64)
    std = calibrated_spread(
        small,
        lambda x, level, condition: slope[level, None] * x + constant[level, None],
        x0,
        None,
        generator=generator,
    )
    assert std.shape == (5, 1)
    error = 0.25 * math.sqrt(2 / rows)
    assert final_variance(small.with_spread(std), slope) == pytest.approx(0.25, abs=4 * error)
    exact = small_spread(schedule, floor=1e-3)[1:] ** 2
    uncertainty = 0.25 * (noise**2 / (signal**2 * 0.25 + noise**2))[2:]  # Var[x0 | x]
    weight = (signal[:-1] * schedule.step_variance[1:] / noise[1:] ** 2)[1:]
    torch.testing.assert_close(
        std[1:, 0] ** 2, exact + weight**2 * uncertainty, rtol=4 * math.sqrt(2 / rows), atol=0
    )


def test_spread_of_each_coordinate_on_its_own():
    schedule, generator = cosine_schedule(4), Generator().manual_seed(0)
    std = torch.rand((4, 2, 3), generator=generator, dtype=torch.float64) + 0.1
    diffusion = GaussianDiffusion(schedule, (2, 3), std, dtype=torch.float64)
    zeros = torch.zeros((4, 2, 3), dtype=torch.float64)
    level = torch.tensor([4, 1, 3, 2])
    assert torch.equal(diffusion.kernel(zeros, zeros, level).std, std[level - 1])


def scaled_kernel(log_scale: Tensor) -> tuple[GaussianKernel, GaussianKernel]:
    """Kernels of one prediction, with a factor on the spread and without."""
    schedule = cosine_schedule(4)
    diffusion = GaussianDiffusion(schedule, (2,), large_spread(schedule), dtype=torch.float64)
    x, level = torch.ones((4, 2), dtype=torch.float64), torch.arange(1, 5)
    x0 = x / 3
    return diffusion.kernel(ScaledPrediction(x0, log_scale), x, level), diffusion.kernel(
        x0, x, level
    )


def test_a_scaled_prediction_multiplies_the_spread_and_leaves_the_mean():
    log_scale = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
    scaled, plain = scaled_kernel(log_scale)
    assert torch.equal(scaled.mean, plain.mean)
    torch.testing.assert_close(scaled.std, plain.std * log_scale.exp())
    unchanged, plain = scaled_kernel(torch.zeros_like(log_scale))
    assert not unchanged.log_ratio(plain, plain.mean + 1).any()


def test_samples_of_a_learned_spread_carry_no_graph():
    log_scale = torch.zeros((4, 2), dtype=torch.float64, requires_grad=True)
    scaled, _ = scaled_kernel(log_scale)
    assert not scaled.sample(generator=Generator().manual_seed(0)).requires_grad


def test_another_spread_changes_nothing_else():
    schedule = cosine_schedule(4)
    before = GaussianDiffusion(schedule, (2,), large_spread(schedule), dtype=torch.float64)
    after = before.with_spread(2 * large_spread(schedule))
    x, level = torch.ones((4, 2), dtype=torch.float64), torch.arange(1, 5)
    kernel, wider = before.kernel(x / 2, x, level), after.kernel(x / 2, x, level)
    assert torch.equal(kernel.mean, wider.mean) and torch.equal(wider.std, 2 * kernel.std)
    assert (after.event_shape, after.levels, after.dtype) == ((2,), 4, torch.float64)


@pytest.mark.parametrize(
    ("std", "message"),
    [
        (torch.tensor([1.0, 0.0, 1.0]), "positive finite spread.*smallest given: 0"),
        (torch.tensor([1.0, -1.0, 1.0]), "positive finite spread.*smallest given: -1"),
        (torch.tensor([1.0, math.nan, 1.0]), "positive finite spread"),
        (torch.tensor([1.0, math.inf, 1.0]), "positive finite spread"),
        (torch.ones(4), r"\(3,\) or \(3, 2\), not \(4,\)"),
        (torch.ones(3, 1), r"\(3,\) or \(3, 2\), not \(3, 1\)"),
    ],
)
def test_a_spread_that_makes_no_density_is_refused(std: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(cosine_schedule(3), (2,), std)


def test_signal_left_is_a_number_and_a_warning_above_five_per_cent():
    one = torch.ones(1, dtype=torch.float64)
    for left, warns in ((0.06, True), (0.04, False), (0.0, False)):
        schedule = Schedule(torch.cat([one, one * 0.5, one * left]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            diffusion = GaussianDiffusion(schedule, (1,), torch.ones(2))
        assert diffusion.signal_left == left
        assert bool(caught) == warns


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_keep_the_tables_of_the_chain(dtype: torch.dtype):
    """A network under autocast answers in half precision; the chain must not be rounded too."""
    schedule = vp_schedule(20)
    diffusion = GaussianDiffusion(schedule, (1,), large_spread(schedule))
    x, level = torch.linspace(-2, 2, 20)[:, None], torch.arange(1, 21)
    prediction = torch.full((20, 1), 0.5, dtype=dtype)  # exact in any of the types
    kernel = diffusion.kernel(prediction, x, level)
    exact = diffusion.kernel(prediction.float(), x, level)
    torch.testing.assert_close(kernel.mean.float(), exact.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kernel.std.float(), exact.std, rtol=1e-6, atol=1e-6)


def test_a_prediction_of_another_shape_is_refused_not_broadcast():
    schedule = cosine_schedule(4)
    diffusion = GaussianDiffusion(schedule, (1,), small_spread(schedule, floor=0.1))
    x, level = torch.zeros(5, 1), torch.ones(5, dtype=torch.int64)
    for wrong in (torch.zeros(5), torch.zeros(5, 2)):
        with pytest.raises(ValueError, match=r"for x of shape \(5, 1\)"):
            diffusion.kernel(wrong, x, level)
        with pytest.raises(ValueError, match=r"for x of shape \(5, 1\)"):
            diffusion.denoising_loss(wrong, x, x, level)
