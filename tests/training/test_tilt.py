"""The start from paths of the prior against closed forms of Gaussian data, exponentially tilted.

Data N(0, 1), the exact denoiser, and spreads such that every marginal of the chain is N(0, 1). Of
r = exp(a x_0) the tilt moves the mean of a step to x_{k-1} by a signal_{k-1} s^2, and log Z is
a^2 / 2: Doob's transform keeps every step Gaussian, at any number of levels.
"""

import copy

import pytest
import torch
from torch import nn

from rtb_rl.core import GaussianDiffusion, StartStep, log_snr_schedule, zero_terminal_signal
from rtb_rl.core.gaussian import large_spread
from rtb_rl.core.trajectory import rollout
from rtb_rl.errors import InputError
from rtb_rl.training import Task
from rtb_rl.training.tilt import TiltSettings, TiltTrainer

LEVELS, TILT = 4, 0.8
SCHEDULE = zero_terminal_signal(log_snr_schedule(LEVELS))
DIFFUSION = GaussianDiffusion(SCHEDULE, (2,), large_spread(SCHEDULE), dtype=torch.float64)
PATHS = 20_000


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
    generator = torch.Generator().manual_seed(0)
    paths = rollout(DIFFUSION, prior, None, PATHS, generator=generator).x

    def draw_step(level, *, generator):
        index = torch.randint(PATHS, level.shape, generator=generator)
        ends = log_reward(paths[0, index], None)
        return (
            paths[level, index],
            paths[level - 1, index],
            None,
            ends,
            torch.full_like(ends, log_z),
        )

    return task, TiltTrainer(task, draw_step, 1.0, settings, generator=generator)


def wanted():
    """The shift of the prediction that moves each step's mean as Doob's transform does."""
    levels = torch.arange(1, LEVELS + 1)
    moved = TILT * SCHEDULE.signal[levels - 1] * DIFFUSION.std[levels].flatten().square()
    return moved / DIFFUSION.weight_x0[levels].flatten()


def test_it_ends_in_the_steps_of_the_exact_posterior():
    settings = TiltSettings(steps=1500, batch=512, learning_rate=0.02, gradient_clip=1e3)
    _, trainer = trainer_of(linear, TILT**2 / 2, settings)
    for step in range(settings.steps):
        trainer.update(step)
    found = trainer.average.module.shift[1:].detach()
    torch.testing.assert_close(found[:, 0], wanted(), atol=0.04, rtol=0)
    torch.testing.assert_close(found[:, 1], torch.zeros(LEVELS).double(), atol=0.04, rtol=0)


def test_a_constant_reward_moves_nothing():
    """Weight and guess are equal on every path: no noise is left, to the last bit."""
    task, trainer = trainer_of(constant, 3.0, TiltSettings(steps=20))
    for step in range(20):
        metrics = trainer.update(step)
        assert float(metrics["tilt/loss"]) == float(metrics["tilt/gradient_norm"]) == 0
    assert (task.posterior.shift == 0).all()


def gradients(log_reward, log_z):
    """d loss / d shift over batches, one a seed: [seeds, levels]."""
    task, trainer = trainer_of(log_reward, log_z, TiltSettings())
    found = []
    for seed in range(60):
        trainer.generator.manual_seed(seed)
        task.posterior.shift.grad = None
        trainer.loss(512).backward()
        found.append(task.posterior.shift.grad[1:, 0].clone())
    return torch.stack(found)


def test_the_guess_takes_noise_away_and_moves_nothing(monkeypatch):
    with_guess = gradients(linear, TILT**2 / 2)
    impossible = torch.full((512,), -torch.inf, dtype=torch.float64)
    monkeypatch.setattr("rtb_rl.training.tilt.score", lambda *given: (impossible, 0))
    without = gradients(linear, TILT**2 / 2)
    difference = (with_guess - without).mean(0).abs()
    assert (difference < 4 * (with_guess - without).std(0) / 60**0.5).all()
    assert with_guess.std(0)[0] < 0.5 * without.std(0)[0]


def test_another_diffusion_is_refused():
    with pytest.raises(InputError, match="needs a GaussianDiffusion, not StartStep"):
        trainer_of(linear, 0.0, TiltSettings(), StartStep(DIFFUSION))
