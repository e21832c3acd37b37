"""The guide against closed forms of a Gaussian chain, and a start that is resumed exactly.

Images of one pixel, data N(0, 1): the prior's exact denoiser is linear and its chain has exact
spreads, so that log E[exp(a x_0) | m] and E[1 (x_0 > 0) | m] are known.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from test_image_posterior import BRIGHT, TINY, new_prior, seeded, target
from torch import nn

from rtb_rl.core import GaussianDiffusion, log_snr_schedule, rollout_against, zero_terminal_signal
from rtb_rl.core.gaussian import large_spread
from rtb_rl.errors import InputError
from rtb_rl.nn.value import ConvValue
from rtb_rl.tasks.image import start as starts
from rtb_rl.tasks.image.follow import Follower, FollowSettings, _Seen
from rtb_rl.tasks.image.guide import Guide, GuidedDenoiser, ValueSettings, ValueTrainer
from rtb_rl.tasks.image.posterior import fit_posterior, posterior_task
from rtb_rl.tasks.image.start import StartSettings, elbo_of_strengths, new_guide
from rtb_rl.training import Task
from rtb_rl.training import posterior_stage as posteriors

LEVELS = 6
SCHEDULE = zero_terminal_signal(log_snr_schedule(LEVELS))
DIFFUSION = GaussianDiffusion(SCHEDULE, (1, 1, 1), large_spread(SCHEDULE), dtype=torch.float64)
TILT = 1.5


class Linear(nn.Module):
    """E[x_0 | x_k] = signal[k] x_k for data N(0, 1) under a schedule of unit variance; or so much
    more at every level, `shift`, if it is trained."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(LEVELS + 1, dtype=torch.float64))

    def forward(self, x, level, condition):
        shift = self.shift[level].reshape(-1, 1, 1, 1)
        return DIFFUSION.signal[level] * x + shift


def remaining(level):
    """x_0 given the mean m of the step from `level`: N(signal m, 1 - signal^2 + (signal s)^2)."""
    below = SCHEDULE.signal[level - 1]
    return below, 1 - below.square() + (below * DIFFUSION.std[level].flatten()).square()


class Exact(Guide):
    """log h for r = exp(TILT x_0), in closed form."""

    def log_value(self, mean, level, condition):
        signal, variance = remaining(level)
        return TILT * signal * mean.flatten() + TILT**2 * variance / 2


def exponential(x0, condition):
    return TILT * x0.flatten()


def linear_task(log_reward=exponential):
    prior = Linear()
    return Task("linear", DIFFUSION, prior, copy.deepcopy(prior), log_reward)


def exact_guide(task):
    return Exact(DIFFUSION, task.prior, nn.Identity())


def test_a_guide_with_the_exact_value_makes_the_exact_posterior():
    """Doob's transform of a linear tilt keeps every step Gaussian: no path is off by anything."""
    task = linear_task()
    guided = GuidedDenoiser(exact_guide(task))
    path, ratio = rollout_against(DIFFUSION, guided, task.prior, None, 500, generator=seeded())
    weight = exponential(path.x0, None) - ratio
    torch.testing.assert_close(weight, torch.full_like(weight, TILT**2 / 2), rtol=0, atol=1e-9)
    assert abs(float(path.x0.mean()) - TILT) < 4 / 500**0.5


def test_the_right_strength_has_the_highest_elbo():
    task = linear_task()
    settings = StartSettings(strengths=(0.0, 0.5, 1.0, 1.5), trial_paths=200)
    guided = GuidedDenoiser(exact_guide(task))
    found = elbo_of_strengths(task, guided, settings, 1.0, seed=0)
    assert max(found, key=lambda strength: found[strength]) == 1.0
    assert found[1.0] == pytest.approx(TILT**2 / 2, abs=1e-9)
    lost = found[1.0] - found[0.5]  # |half a pull|^2 / 2 a step, and pulls sum to TILT^2 / 2 nats
    assert lost == pytest.approx(found[1.0] - found[1.5], abs=0.3)


def test_the_follower_ends_in_the_guided_chain():
    task = linear_task()
    settings = FollowSettings(steps=300, batch=64, paths=64, every=10, learning_rate=0.05)
    guided = GuidedDenoiser(exact_guide(task))
    follower = Follower(task, guided, settings, generator=seeded())
    first = float(follower.update(0)["start/divergence"])
    last = [float(follower.update(step)["start/divergence"]) for step in range(1, 300)][-1]
    assert first == pytest.approx(TILT**2 / 2, abs=0.2), "the KL of the exact posterior's paths"
    assert last < 1e-3
    shift = follower.average.module.shift[1:]
    levels = torch.arange(1, LEVELS + 1)
    signal, _ = remaining(levels)
    pull = TILT * signal * DIFFUSION.std[levels].flatten().square()
    torch.testing.assert_close(
        shift, pull / DIFFUSION.weight_x0[levels].flatten(), rtol=0, atol=0.02
    )


def test_only_the_last_paths_are_learned_from():
    """Three times of four paths, two kept; a condition stays with its path."""
    seen = _Seen(2, torch.device("cpu"))
    for time in range(3):
        x = torch.full((LEVELS, 4, 1), float(time))
        seen.add(x, -x, torch.full((4,), time))
    x, wanted, level, condition = seen.draw(200, generator=seeded())
    assert set(x.flatten().tolist()) == {1.0, 2.0}
    assert x.equal(-wanted) and x.flatten().equal(condition.float())
    assert set(level.tolist()) == set(range(1, LEVELS + 1))


def test_no_strength_to_choose_from_is_refused():
    with pytest.raises(InputError, match="give at least one"):
        StartSettings(strengths=())


def positive(x0, condition):
    return torch.where(x0.flatten() > 0, 0.0, -torch.inf)


def test_the_value_learned_from_draws_is_the_exact_one():
    """Of r = 1 (x_0 > 0), zero for half of the draws: h = Phi(signal m / deviation)."""
    task = linear_task(positive)
    network = ConvValue((2, 1, 1), LEVELS, width=16, generator=seeded(1)).double()
    guide = Guide(DIFFUSION, task.prior, network)
    draws = torch.randn(20_000, 1, 1, 1, dtype=torch.float64, generator=seeded(2))
    settings = ValueSettings(steps=500, batch=256, learning_rate=3e-3)
    trainer = ValueTrainer(task, guide, draws, 1.0, settings, generator=seeded(3))
    for step in range(settings.steps):
        trainer.update(step)
    guide.network = trainer.average.module
    level = torch.arange(1, LEVELS + 1).repeat_interleave(200)
    x0 = torch.randn(len(level), 1, 1, 1, dtype=torch.float64, generator=seeded(4))
    x = DIFFUSION.corrupt(x0, level, generator=seeded(5))
    mean = DIFFUSION.kernel(task.prior(x, level, None), x, level).mean.detach()
    signal, variance = remaining(level)
    wanted = torch.special.ndtr(signal * mean.flatten() / variance.sqrt())
    found = guide.log_value(mean, level, None).exp()
    assert float((found - wanted).abs().mean()) < 0.03
    slope = guide.pull(mean, level, None).flatten()
    step = 1e-7
    up, down = (guide.log_value(mean + sign * step, level, None) for sign in (1, -1))
    by_hand = DIFFUSION.std[level].flatten() * (up - down) / (2 * step)
    torch.testing.assert_close(slope, by_hand.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["every class", "measurement"])
def test_the_guide_is_told_classes_and_observations(name):
    """And several of them for one image, neighbours, are what they are one by one."""
    asked = target(name)
    draws = torch.rand(20, 1, 8, 8, generator=seeded(3)) * 2 - 1
    task, _ = posterior_task(new_prior(), asked, TINY, seed=0)
    guide = new_guide(task, draws, ValueSettings(width=4), 1.0, encode=asked.encode, seed=0)
    condition, _ = task.draw_conditions(8, generator=seeded(5))
    mean, level = draws[:1].expand(8, -1, -1, -1), torch.full((8,), 3)
    found = guide.logit(mean, level, condition).detach()
    assert len({round(value, 5) for value in found.tolist()}) > 1
    several = guide.logit(draws[:2], level[:2], condition).detach()
    each = guide.logit(draws[:2].repeat_interleave(4, 0), level, condition).detach()
    torch.testing.assert_close(several, each)


START = StartSettings(
    value=ValueSettings(draws=30, steps=6, batch=8, width=4),
    strengths=(0.0, 1.0),
    trial_paths=8,
    follow=FollowSettings(steps=6, batch=8, paths=4, every=2, kept=2),
)


def calls_of_start(strength):
    """Rows through the U-Net, three for one whose gradient is kept, of START at five levels."""
    draws, value = 30 * 5, 6 * (8 + 8)
    plain, guided = 8 + 8, 8 + 3 * 8 + 8  # rows of a level: prior, its pull, log-ratio
    looks = 3 * 5 * 4 * (1 + (4 if strength else 1))  # the average's paths, and the guide on them
    return draws + value + 5 * (plain + guided) + looks + 6 * 3 * 8


@pytest.mark.parametrize("name", ["copy", "lora", "every class"])
def test_a_started_posterior_can_be_told_from_the_prior_and_is_trained_on(name, tmp_path):
    settings = replace(TINY, start=START, lora_rank=2 if name == "lora" else None)
    found = fit_posterior(tmp_path, new_prior(), target(name), settings).results
    assert found["start"]["strength"] in START.strengths
    assert found["seconds"] > found["start"]["seconds"] > 0
    assert found["network_calls"] > found["start"]["network_calls"]
    if name == "copy":
        assert found["start"]["network_calls"] == calls_of_start(found["start"]["strength"])
    assert math.isfinite(found["diagnostics"]["elbo"])


@pytest.mark.parametrize("interrupted", ["value", "start", "posterior"])
def test_an_interrupted_start_ends_like_one_that_was_not(interrupted, tmp_path, monkeypatch):
    settings = replace(TINY, start=START)
    whole = fit_posterior(tmp_path / "whole", new_prior(), BRIGHT, settings)
    module = posteriors if interrupted == "posterior" else starts
    train = starts.train

    def stopped(run, update, parts, *, steps, description, **options):
        if description != interrupted:
            return train(run, update, parts, steps=steps, description=description, **options)
        options["checkpoint_every"] = 3
        train(run, update, parts, steps=3, description=description, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            fit_posterior(tmp_path / "parts", new_prior(), BRIGHT, settings)
    again = fit_posterior(tmp_path / "parts", new_prior(), BRIGHT, settings)
    for one, other in zip(whole.unet.parameters(), again.unet.parameters(), strict=True):
        assert one.equal(other)
    assert again.results["network_calls"] == whole.results["network_calls"]
    assert again.results["diagnostics"] == whole.results["diagnostics"]
