"""The start from rewarded draws against closed forms of Gaussian data under an exponential tilt.

Data N(0, 1) and r = exp(a x_0): given x_k, x_0 is N(signal x_k, noise^2), so that the tilt moves
its mean by a noise^2 at every level, and log Z = a^2 / 2.
"""

import copy

import pytest
import torch
from torch import nn

from rtb_rl.core import GaussianDiffusion, StartStep, log_snr_schedule, zero_terminal_signal
from rtb_rl.core.gaussian import large_spread
from rtb_rl.errors import InputError
from rtb_rl.training import Task
from rtb_rl.training.tilt import TiltSettings, TiltTrainer

LEVELS, TILT = 5, 0.8
SCHEDULE = zero_terminal_signal(log_snr_schedule(LEVELS))
DIFFUSION = GaussianDiffusion(SCHEDULE, (2,), large_spread(SCHEDULE), dtype=torch.float64)


class Linear(nn.Module):
    """E[x_0 | x_k] = signal[k] x_k of such data, or so much more at each level if it is trained."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(LEVELS + 1, 2, dtype=torch.float64))

    def forward(self, x, level, condition):
        return SCHEDULE.signal[level, None] * x + self.shift[level]


def linear(x0, condition):
    return TILT * x0[:, 0]


def constant(x0, condition):
    return torch.full((len(x0),), 3.0, dtype=x0.dtype)


def trainer_of(log_reward, log_z, settings, diffusion=DIFFUSION):
    prior = Linear()
    task = Task("linear", diffusion, prior, copy.deepcopy(prior), log_reward)

    def rewarded(n, *, generator):
        x0 = torch.randn((n, 2), generator=generator, dtype=torch.float64)
        return x0, None, log_reward(x0, None), torch.full((n,), log_z, dtype=torch.float64)

    generator = torch.Generator().manual_seed(0)
    return task, TiltTrainer(task, rewarded, 1.0, settings, generator=generator)


def test_it_ends_in_the_tilted_prediction():
    settings = TiltSettings(steps=1500, batch=512, learning_rate=0.02, gradient_clip=1e3)
    _, trainer = trainer_of(linear, TILT**2 / 2, settings)
    for step in range(settings.steps):
        trainer.update(step)
    found = trainer.average.module.shift[1:].detach()
    wanted = TILT * (1 - SCHEDULE.signal[1:].square())
    torch.testing.assert_close(found[:, 0], wanted, atol=0.03, rtol=0)
    torch.testing.assert_close(found[:, 1], torch.zeros_like(wanted), atol=0.03, rtol=0)


def test_a_constant_reward_moves_nothing():
    """Weight and guess are equal on every draw: no noise is left, to the last bit."""
    task, trainer = trainer_of(constant, 3.0, TiltSettings(steps=20))
    for step in range(20):
        metrics = trainer.update(step)
        assert float(metrics["tilt/loss"]) == float(metrics["tilt/gradient_norm"]) == 0
    assert (task.posterior.shift == 0).all()


def test_late_levels_have_little_noise():
    """Gradients of many batches at the last level, against those without the guess."""
    task, trainer = trainer_of(linear, TILT**2 / 2, TiltSettings())
    with_guess, without = [], []
    for seed in range(100):
        trainer.generator.manual_seed(seed)
        task.posterior.shift.grad = None
        trainer.loss(256).backward()
        with_guess.append(task.posterior.shift.grad[1, 0].clone())
        generator = torch.Generator().manual_seed(seed)
        x0 = torch.randn((256, 2), generator=generator, dtype=torch.float64)
        level = torch.ones(256, dtype=torch.int64)
        x = DIFFUSION.corrupt(x0, level, generator=generator)
        rest = x0[:, 0] - (SCHEDULE.signal[1] * x)[:, 0]
        weight = (TILT * x0[:, 0] - TILT**2 / 2).exp()
        scale = float((DIFFUSION.weight_x0[1] / DIFFUSION.std[1]).square())
        without.append(-scale * (weight * rest).mean())
    assert torch.stack(with_guess).std() < 0.5 * torch.stack(without).std()


def test_another_diffusion_is_refused():
    with pytest.raises(InputError, match="needs a GaussianDiffusion, not StartStep"):
        trainer_of(linear, 0.0, TiltSettings(), StartStep(DIFFUSION))
