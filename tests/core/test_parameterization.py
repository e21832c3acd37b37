"""Wrappers that turn predictions of noise, velocity or score into predictions of clean data."""

import pytest
import torch
from torch import Generator, Tensor

from rtb_rl.core import (
    NoisePrediction,
    ScorePrediction,
    VelocityPrediction,
    cosine_schedule,
    linear_schedule,
    vp_schedule,
    zero_terminal_signal,
)

SCHEDULES = [linear_schedule(30), vp_schedule(6), cosine_schedule(6)]


def noised(schedule, event, levels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x0, eps, x, and the signal and noise of each row."""
    generator = Generator().manual_seed(0)
    shape = (len(levels), *event)
    x0, eps = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    signal, noise = (
        table[levels].reshape(-1, *(1,) * len(event)) for table in (schedule.signal, schedule.noise)
    )
    return x0, eps, signal * x0 + noise * eps, signal, noise


@pytest.mark.parametrize("event", [(1,), (3,), (2, 4, 4)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_was_put_in_comes_out(schedule, event):
    """For a known x0: eps; v = signal eps - noise x0; score of q(x | x0) = -eps / noise."""
    level = torch.arange(1, schedule.levels + 1)
    x0, eps, x, signal, noise = noised(schedule, event, level)
    outputs = {
        NoisePrediction: eps,
        VelocityPrediction: signal * eps - noise * x0,
        ScorePrediction: -eps / noise,
    }
    for wrapper, output in outputs.items():

        def network(x, level, condition, output=output):
            return output

        predicted = wrapper(network, schedule)(x, level, None)
        torch.testing.assert_close(predicted, x0, rtol=1e-9, atol=1e-9)


def test_velocity_is_fine_without_signal():
    schedule = zero_terminal_signal(vp_schedule(5))
    level = torch.full((3,), 5)
    x0, eps, x, signal, noise = noised(schedule, (2,), level)
    wrapper = VelocityPrediction(lambda x, level, condition: signal * eps - noise * x0, schedule)
    torch.testing.assert_close(wrapper(x, level, None), x0)


@pytest.mark.parametrize("wrapper", [NoisePrediction, ScorePrediction])
def test_noise_and_score_are_refused_where_no_signal_is_left(wrapper):
    schedule = zero_terminal_signal(vp_schedule(5))
    with pytest.raises(ValueError, match="predict velocity or clean data"):
        wrapper(lambda x, level, condition: x, schedule)


def test_the_network_is_given_point_level_and_condition_and_gets_the_gradient():
    schedule = vp_schedule(4)
    network = torch.nn.Linear(2, 2).double()
    seen = {}

    def call(x, level, condition):
        seen.update(x=x, level=level, condition=condition)
        return network(x)

    x, level = torch.ones((3, 2), dtype=torch.float64), torch.tensor([1, 4, 2])
    condition = {"goal": torch.zeros(3, 1)}
    VelocityPrediction(call, schedule)(x, level, condition).sum().backward()
    assert seen["x"] is x and seen["level"] is level and seen["condition"] is condition
    expected = -schedule.noise[level].sum()
    torch.testing.assert_close(network.bias.grad, expected.expand(2))


def test_a_wrapped_module_keeps_its_parameters_and_nothing_else_in_its_state():
    network = torch.nn.Linear(2, 2)
    wrapper = NoisePrediction(network, vp_schedule(4))
    assert sorted(wrapper.state_dict()) == ["network.bias", "network.weight"]
    assert list(wrapper.parameters()) == list(network.parameters())


def test_images_are_not_silently_taken_for_vectors():
    schedule = vp_schedule(4)
    level = torch.arange(1, 5)
    x0, eps, x, _, _ = noised(schedule, (2, 4, 4), level)
    wrapper = NoisePrediction(lambda x, level, condition: eps, schedule)
    torch.testing.assert_close(wrapper(x, level, None), x0)
