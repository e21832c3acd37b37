"""Schedules: published constants, closed forms, and what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rtb_rl.core import (
    GaussianDiffusion,
    Schedule,
    cosine_schedule,
    linear_schedule,
    log_snr_schedule,
    vp_schedule,
    zero_terminal_signal,
)


def signal_squared(schedule: Schedule) -> float:
    return float(schedule.signal[-1] ** 2)


def test_linear_schedule_of_1000_levels_is_the_published_one():
    schedule = linear_schedule(1000)
    assert signal_squared(schedule) == pytest.approx(4.0358e-5, rel=1e-4)
    assert schedule.step_variance[1].item() == pytest.approx(1e-4, rel=1e-9)
    assert schedule.step_variance[-1].item() == pytest.approx(0.02, rel=1e-9)


@pytest.mark.parametrize("levels", [25, 75, 200])
def test_linear_schedule_reaches_noise_whatever_the_number_of_levels(levels):
    assert signal_squared(linear_schedule(levels)) < 5e-5


def test_linear_schedule_at_75_levels():
    schedule = linear_schedule(75)
    assert signal_squared(schedule) == pytest.approx(1.5207e-5, rel=1e-4)
    expected = torch.linspace(1e-4, 0.02, 75, dtype=torch.float64) * 1000 / 75
    torch.testing.assert_close(schedule.step_variance[1:], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("rescaled", "left"), [(False, 0.4541), (True, 9.586e-6)])
def test_published_mistake_4_betas_of_1000_steps_over_75_levels(rescaled, left):
    """The released grid: 76 betas, first + j (last - first) / 75 with j = 1..76, used unscaled."""
    beta = 1e-4 + torch.arange(1, 77, dtype=torch.float64) * 0.0199 / 75
    beta = beta * (1000 / 75 if rescaled else 1)
    signal = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0).sqrt()])
    schedule = Schedule(signal)
    assert signal_squared(schedule) == pytest.approx(left, rel=1e-4)
    if rescaled:
        GaussianDiffusion(schedule, (1,), torch.ones(76))
    else:
        with pytest.warns(UserWarning, match=r"signal 0\.674 at level 76"):
            GaussianDiffusion(schedule, (1,), torch.ones(76))


@pytest.mark.parametrize("levels", [1, 5, 50])
def test_vp_schedule_closed_form(levels):
    schedule = vp_schedule(levels, beta_min=0.2, beta_max=14.0)
    time = torch.arange(levels + 1, dtype=torch.float64) / levels
    expected = (-(0.2 * time + (14.0 - 0.2) * time**2 / 2) / 2).exp()
    torch.testing.assert_close(schedule.signal, expected, rtol=1e-12, atol=0)
    assert float(vp_schedule(levels).signal[-1]) == pytest.approx(math.exp(-20.1 / 4), rel=1e-12)


@pytest.mark.parametrize("levels", [2, 8])
def test_log_snr_schedule_has_even_steps_between_its_ends(levels):
    schedule = log_snr_schedule(levels, first_noise=0.1, last_signal=0.02)
    ratio = (schedule.noise / schedule.signal)[1:]
    assert ratio[0].item() == pytest.approx(0.1, rel=1e-9)
    assert ratio[-1].item() == pytest.approx(50, rel=1e-9)
    step = ratio.log().diff()
    torch.testing.assert_close(step, step[:1].expand_as(step), rtol=1e-9, atol=0)


def test_cosine_schedule_closed_form():
    schedule = cosine_schedule(5)
    for level in range(1, 5):
        angle = [(time + 0.008) / 1.008 * math.pi / 2 for time in (level / 5, 0)]
        expected = math.cos(angle[0]) / math.cos(angle[1])
        assert schedule.signal[level].item() == pytest.approx(expected, rel=1e-12)
    assert schedule.signal[5].item() == pytest.approx(1e-3, rel=1e-9)


@pytest.mark.parametrize("levels", [2, 5, 75])
@pytest.mark.parametrize("make", [vp_schedule, cosine_schedule])
def test_zero_terminal_signal_is_exactly_zero_and_keeps_the_first_level(make, levels):
    before = make(levels)
    after = zero_terminal_signal(before)
    assert after.signal[-1] == 0 and after.noise[-1] == 1 and after.step_variance[-1] == 1
    assert after.signal[1].item() == pytest.approx(before.signal[1].item(), rel=1e-12)
    stretch = after.signal[1:].diff() / before.signal[1:].diff()
    torch.testing.assert_close(stretch, stretch[:1].expand_as(stretch), rtol=1e-9, atol=0)


@given(
    st.sampled_from([linear_schedule, cosine_schedule, vp_schedule, log_snr_schedule]),
    st.integers(21, 300),
    st.booleans(),
)
def test_signal_noise_and_step_variance_agree(make, levels, zero_terminal):
    schedule = make(levels)
    if zero_terminal:
        schedule = zero_terminal_signal(schedule)
    assert schedule.levels == levels
    one = torch.ones(levels + 1, dtype=torch.float64)
    torch.testing.assert_close(schedule.signal**2 + schedule.noise**2, one)
    kept = (1 - schedule.step_variance).cumprod(0)
    torch.testing.assert_close(kept, schedule.signal**2, rtol=1e-9, atol=1e-14)
    assert schedule.step_variance[0] == 0 and bool((schedule.step_variance[1:] > 0).all())


@pytest.mark.parametrize(
    "signal",
    [
        [1.0],
        [[1.0, 0.5]],
        [0.0, -0.5],
        [1.1, 0.5],
        [1.0, 0.5, 0.5],
        [1.0, 0.5, 0.6],
        [1.0, -0.1],
        [1.0, math.nan],
    ],
)
def test_a_signal_that_is_no_schedule_is_refused(signal):
    with pytest.raises(ValueError, match="signal"):
        Schedule(torch.tensor(signal, dtype=torch.float64))


@pytest.mark.parametrize("levels", [5, 20])
def test_too_few_levels_for_a_linear_schedule(levels):
    with pytest.raises(ValueError, match="more than 20 levels, or vp_schedule"):
        linear_schedule(levels)
    linear_schedule(21)


def test_zero_terminal_signal_needs_two_levels():
    with pytest.raises(ValueError, match="two levels"):
        zero_terminal_signal(vp_schedule(1))


def test_a_chain_that_stops_short_of_clean_data_keeps_that_noise():
    """The step from level 1 to a slightly noisy level 0 is Bayes' rule at the predicted x_0."""
    signal = torch.tensor([0.99, 0.8, 0.1], dtype=torch.float64)
    schedule = Schedule(signal)
    diffusion = GaussianDiffusion(schedule, (1,), torch.ones(2), dtype=torch.float64)
    ratio = 0.8 / 0.99
    precision = 1 / (1 - 0.99**2) + ratio**2 / (1 - ratio**2)
    expected = (0.99 * 0.3 / (1 - 0.99**2) + ratio * 0.5 / (1 - ratio**2)) / precision
    x, x0 = (torch.tensor([[v]], dtype=torch.float64) for v in (0.5, 0.3))
    mean = diffusion.kernel(x0, x, torch.tensor([1])).mean
    assert mean.item() == pytest.approx(expected, rel=1e-12)


def test_one_level_is_too_few_for_a_linear_schedule_as_well():
    with pytest.raises(ValueError, match="1 levels has beta 20 >= 1"):
        linear_schedule(1)
