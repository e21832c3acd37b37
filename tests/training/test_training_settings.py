"""Numbers that would train away from the target, or not at all, are refused before anything is."""

import math

import pytest
import torch
from torch import nn

from rtb_rl.baselines.trainer import BaselineSettings
from rtb_rl.core import GaussianDiffusion, ScalarLogZ, Schedule, huber, linex
from rtb_rl.errors import InputError
from rtb_rl.training import Finetuner, FinetuneSettings, Task
from rtb_rl.training.rewarded import RewardedSettings, RewardedTrainer
from rtb_rl.training.rewarded_draws import RewardedDraws
from rtb_rl.training.settings import check_settings

DIFFUSION = GaussianDiffusion(Schedule(torch.tensor([1.0, 0.5, 0.0])), (1,), torch.ones(2))
NAN = math.nan


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.zeros(1))

    def forward(self, x, level, condition):
        return self.at.expand_as(x)


def make_task():
    return Task("shift", DIFFUSION, Shift(), Shift(), lambda x0, condition: x0[:, 0])


def seeded():
    return torch.Generator().manual_seed(0)


def fit(**changed):
    return Finetuner(make_task(), ScalarLogZ(), FinetuneSettings(**changed), generator=seeded())


def start(**changed):
    draws = RewardedDraws.of_one_prior(make_task(), torch.ones(20, 1), None, 1.0)
    return RewardedTrainer(make_task(), draws, 1.0, RewardedSettings(**changed), generator=seeded())


SHARED = [
    ("gradient_clip", 0.0, "above 0"),
    ("gradient_clip", -1.0, "above 0"),
    ("gradient_clip", NAN, "above 0"),
    ("learning_rate", -1e-3, "0 or more"),
    ("learning_rate", math.inf, "0 or more"),
    ("average_decay", 1.0, "from 0 to below 1"),
    ("average_decay", -0.5, "from 0 to below 1"),
    ("average_decay", NAN, "from 0 to below 1"),
    ("conditions", 0, "1 or more"),
]
FINETUNE = [
    ("updates", 0, "1 or more"),
    ("chunk", 0, "1 or more"),
    ("draw_batch", 0, "1 or more"),
    ("draw_batch", -3, "1 or more"),
    ("levels_per_path", 0, "1 or more"),
    ("last_learning_rate", -0.1, "0 or more"),
    ("log_reward_floor", -math.inf, "finite"),
    ("log_reward_floor", NAN, "finite"),
]
LOG_Z = [
    ("log_z_learning_rate", -0.1, "0 or more"),
    ("widening", 0.0, "above 0"),
    ("replay_capacity", 0, "1 or more"),
    ("replay_tilt", -1.0, "0 or more"),
]
START = [
    ("steps", 0, "1 or more"),
    ("draws", 0, "1 or more"),
    ("batch", 0, "1 or more"),
    ("input_rate", -1.0, "0 or more"),
]


@pytest.mark.parametrize(("name", "value", "cure"), SHARED + FINETUNE + LOG_Z)
def test_fine_tuning_refuses(name, value, cure):
    with pytest.raises(InputError, match=f"{name} is {value}; give .*{cure}"):
        fit(**{name: value})


@pytest.mark.parametrize(("name", "value", "cure"), SHARED + START)
def test_a_start_refuses(name, value, cure):
    with pytest.raises(InputError, match=f"{name} is {value}; give .*{cure}"):
        start(**{name: value})


@pytest.mark.parametrize(("name", "value", "cure"), SHARED + FINETUNE)
def test_settings_of_a_baseline_can_be_checked_alike(name, value, cure):
    with pytest.raises(InputError, match=f"{name} is {value}; give .*{cure}"):
        check_settings(BaselineSettings(**{name: value}))


def test_defaults_and_the_ends_of_each_range_are_fine():
    ends = {"gradient_clip": math.inf, "learning_rate": 0.0, "average_decay": 0.0}
    fit(**ends, last_learning_rate=0.0, updates=1, chunk=1, draw_batch=1, levels_per_path=None)
    start(**ends, steps=1, batch=1, conditions=1)
    for settings in (FinetuneSettings(), RewardedSettings(), BaselineSettings()):
        check_settings(settings)


@pytest.mark.parametrize("penalty", [linex, huber])
@pytest.mark.parametrize("limit", [0.0, -1.0, NAN])
def test_a_penalty_without_a_positive_limit_is_refused_when_it_is_made(penalty, limit):
    """linex(-1) pushed weights up that are too large."""
    with pytest.raises(ValueError, match=f"is {limit}; give a positive"):
        penalty(limit)
