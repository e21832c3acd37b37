"""A chain that keeps signal at the last level: exact with a start law of its own, not without."""

import pytest
import torch
from torch import Generator, Tensor

from rtb_rl.core import (
    GaussianDiffusion,
    ScaledPrediction,
    Schedule,
    StandardStart,
    StartStep,
    Trajectory,
    log_ratio,
    log_weight,
    noise_back,
    rollout,
)
from rtb_rl.core.gaussian import large_spread
from rtb_rl.nn import LearnedStart
from rtb_rl.tasks.toy import GaussianDenoiser, chain_of, denoiser_of, squared_reward, tilt

ONE = torch.ones(1, dtype=torch.float64)
SIGNALS = torch.tensor([1.0, 0.95, 0.85, 0.7, 0.6], dtype=torch.float64)
REWARD = squared_reward(3.0 * ONE, 1.8 * ONE)


@pytest.fixture
def parts():
    schedule = Schedule(SIGNALS)
    with pytest.warns(UserWarning, match="leaves signal 0.600"):
        inner = GaussianDiffusion(schedule, (1,), large_spread(schedule), dtype=torch.float64)
    prior = GaussianDenoiser(schedule, ONE, 0.25 * ONE)
    tilted, value = tilt(chain_of(inner, prior), REWARD)
    mean, log_scale = denoiser_of(inner, tilted), (tilted.std / chain_of(inner, prior).std).log()

    class Exact(torch.nn.Module):
        def forward(self, x: Tensor, level: Tensor, condition: object) -> ScaledPrediction:
            return ScaledPrediction(mean(x, level, None), log_scale[level - 1])

    return inner, prior, Exact(), value


def test_with_a_learned_start_the_residual_is_zero_on_any_path(parts):
    inner, prior, exact, value = parts
    diffusion = StartStep(inner)
    posterior = LearnedStart(exact, diffusion).double()
    start_mean, start_variance = value.tilted_start()
    posterior.start.data = torch.stack([start_mean, start_variance.sqrt().log()])
    generator = Generator().manual_seed(0)
    reference = StandardStart(prior, diffusion)
    hand_made = 3 * torch.randn((6, 20, 1), generator=generator, dtype=torch.float64)
    hand_made[-1] = 0.0
    for path in (
        rollout(diffusion, posterior, None, 20, generator=generator),
        rollout(diffusion, reference, None, 20, generator=generator),
        noise_back(diffusion, hand_made[0], None, generator=generator),
        Trajectory(hand_made),
    ):
        weight = log_weight(REWARD(path.x0), log_ratio(diffusion, posterior, reference, path), 1.0)
        torch.testing.assert_close(weight, value.log_mean_exp().expand(20), rtol=0, atol=1e-10)


def test_with_the_prior_s_start_it_is_not(parts):
    inner, prior, exact, _ = parts
    path = rollout(inner, exact, None, 50, generator=Generator().manual_seed(0))
    weight = log_weight(REWARD(path.x0), log_ratio(inner, exact, prior, path), 1.0)
    assert weight.std() > 0.3


def test_an_untrained_start_changes_no_draw(parts):
    inner, prior, _, _ = parts
    diffusion = StartStep(inner)
    reference = StandardStart(prior, diffusion)
    first, second = (
        rollout(diffusion, d, None, 6, generator=Generator().manual_seed(1))
        for d in (reference, LearnedStart(reference, diffusion))
    )
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.x[-1], torch.zeros(6, 1).double())
    assert diffusion.signal_left == 0.0 and diffusion.levels == 5
    # x[K] is N(0, I), and from there on the chain is the inner one
    plain = rollout(inner, prior, None, 6, generator=Generator().manual_seed(1))
    torch.testing.assert_close(first.x[:-1], plain.x)
