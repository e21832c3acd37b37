"""Networks with dropout: a posterior is one law while it is trained, a prior is one when done."""

import copy

import pytest
import torch
from torch import nn

from rtb_rl.baselines.policy_gradient import PolicyGradient
from rtb_rl.baselines.surrogates import Ddpo
from rtb_rl.baselines.trainer import BaselineSettings
from rtb_rl.core import (
    GaussianDiffusion,
    ScalarLogZ,
    VelocityPrediction,
    log_snr_schedule,
    zero_terminal_signal,
)
from rtb_rl.core.gaussian import large_spread
from rtb_rl.training import (
    Finetuner,
    FinetuneSettings,
    Mix,
    Pretrainer,
    PretrainSettings,
    Run,
    Task,
    train,
)
from rtb_rl.training.rewarded import RewardedSettings, RewardedTrainer
from rtb_rl.training.rewarded_draws import RewardedDraws

SCHEDULE = zero_terminal_signal(log_snr_schedule(5))
DIFFUSION = GaussianDiffusion(SCHEDULE, (2,), large_spread(SCHEDULE))
SETTINGS = FinetuneSettings(updates=6, conditions=16, mix=Mix(4, data=0), beta_warmup=1)


class Dropping(nn.Module):
    """Two layers of random weights with dropout between them, as made: in training mode."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Dropout(0.3), nn.Linear(32, 2))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=seeded()) / 4

    def forward(self, x, level, condition):
        return self.layers(x)


def seeded():
    return torch.Generator().manual_seed(0)


def make_task(log_reward):
    prior = VelocityPrediction(Dropping(), SCHEDULE)
    return Task("dropping", DIFFUSION, prior, copy.deepcopy(prior), log_reward)


def nothing(x0, condition):
    return torch.zeros(len(x0))


def first(x0, condition):
    return x0[:, 0]


def finetuner(task):
    return Finetuner(task, ScalarLogZ(), SETTINGS, generator=seeded())


def rewarded(task):
    draws = RewardedDraws.of_one_prior(task, torch.randn((50, 2), generator=seeded()), None, 1.0)
    settings = RewardedSettings(steps=6, warmup=0, batch=16)
    return RewardedTrainer(task, draws, 1.0, settings, generator=seeded())


def policy_gradient(task):
    settings = BaselineSettings(updates=6, conditions=1, paths=16)
    return PolicyGradient(task, settings, surrogate=Ddpo(), generator=seeded())


def test_a_copy_of_the_prior_has_no_log_ratio():
    metrics = finetuner(make_task(nothing)).update(0)
    assert float(metrics["rtb/log_ratio"]) == 0 and float(metrics["rtb/residual_std"]) == 0


@pytest.mark.parametrize("trainer", [finetuner, rewarded, policy_gradient])
def test_an_interrupted_training_goes_on_bit_for_bit(trainer, tmp_path):
    def weights(directory, *ends):
        for end in ends:
            task = make_task(first)
            made = trainer(task)
            torch.rand(end)  # the global generator is elsewhere in every process
            train(Run(directory, {}), made.update, made.parts, steps=end, description="t")
        return task.posterior.state_dict()

    before = make_task(first).posterior.state_dict()
    whole, parts = weights(tmp_path / "whole", 6), weights(tmp_path / "parts", 3, 6)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(not torch.equal(whole[name], before[name]) for name in whole)


def test_a_posterior_put_to_training_mode_since_is_put_back():
    task = make_task(nothing)
    task.posterior.train()
    assert float(finetuner(task).update(0)["rtb/log_ratio"]) == 0


def test_a_prior_is_trained_with_its_dropout_and_is_one_law_when_done():
    settings = PretrainSettings(steps=3, batch=8)

    def draw(n, *, generator):
        return torch.randn((n, 2), generator=generator), None

    trainer = Pretrainer(DIFFUSION, Dropping(), draw, settings, generator=seeded())
    trainer.update(0)
    x, level = torch.ones(4, 2), torch.ones(4, dtype=torch.int64)
    for module, is_one in ((trainer.denoiser, False), (trainer.average.module, True)):
        assert torch.equal(module(x, level, None), module(x, level, None)) == is_one
