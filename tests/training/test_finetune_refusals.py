"""What fine-tuning refuses before it trains, and what it must not learn from."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rtb_rl.core import GaussianDiffusion, ScalarLogZ, Schedule
from rtb_rl.errors import InputError
from rtb_rl.training import Finetuner, FinetuneSettings, Mix, Task
from rtb_rl.training.rewarded import RewardedSettings, RewardedTrainer
from rtb_rl.training.rewarded_draws import RewardedDraws
from rtb_rl.training.scoring import score

DIFFUSION = GaussianDiffusion(Schedule(torch.tensor([1.0, 0.5, 0.0])), (1,), torch.ones(2))
SETTINGS = {"conditions": 64, "beta_warmup": 1, "levels_per_path": None, "mix": Mix(1, data=0)}


class Shift(nn.Module):
    """A constant prediction; `spare` is a parameter that it never asks."""

    def __init__(self):
        super().__init__()
        self.at, self.spare = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x, level, condition):
        return self.at.expand_as(x)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def half_line(x0, condition):
    """Impossible below zero."""
    return torch.where(x0[:, 0] > 0, 0.5, -torch.inf)


def new_task(log_reward=half_line, posterior=None):
    return Task("half line", DIFFUSION, Shift(), posterior or Shift(), log_reward)


def finetuner(task, accelerator=None, **settings):
    chosen = FinetuneSettings(**SETTINGS | settings)
    log_z = ScalarLogZ()
    return Finetuner(task, log_z, chosen, generator=seeded(), accelerator=accelerator)


def test_log_z_starts_from_possible_points_alone():
    """Half of the first paths have reward zero: their floor of -1e6 nats would never be unlearned.

    Posterior and prior are equal at first, so that the log-weight of every possible path is 0.5.
    """
    tuned = finetuner(new_task())
    metrics = tuned.update(0)
    assert 10 < metrics["rtb/floored"] < 54
    assert float(metrics["rtb/log_z"]) == pytest.approx(0.5)


def test_a_posterior_with_nothing_to_train_is_refused():
    prior = Shift()
    frozen = copy.deepcopy(prior).requires_grad_(False)
    for task in (
        new_task(posterior=frozen),
        Task("same", DIFFUSION, prior, prior, half_line),
    ):
        with pytest.raises(InputError, match="no parameter to train"):
            finetuner(task)
        draws = RewardedDraws.of_one_prior(task, torch.ones(20, 1), None, 1.0)
        with pytest.raises(InputError, match="no parameter to train"):
            RewardedTrainer(task, draws, 1.0, RewardedSettings(), generator=seeded())


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_a_strength_that_is_no_positive_number_is_refused(beta):
    with pytest.raises(InputError, match="give a positive number"):
        finetuner(new_task(), beta=beta)


def test_every_process_takes_part_in_the_average_of_every_parameter():
    """One whose paths ask a parameter nothing gives zero; leaving it out would block the others."""
    given = []

    def reduce(gradient, reduction):
        given.append(gradient)
        return gradient

    both = SimpleNamespace(num_processes=2, reduce=reduce, gather=lambda values: values)
    task = new_task()
    finetuner(task, both).update(0)
    assert task.posterior.spare.grad is not None and float(task.posterior.spare.grad) == 0
    assert len(given) == 3  # two of the posterior, log Z


def test_half_precision_rewards_have_a_finite_floor():
    found, floored = score(
        new_task(lambda x0, c: half_line(x0, c).half()), torch.tensor([[1.0], [-1.0]]), None
    )
    assert found.tolist() == [0.5, -1e6] and floored == 1


FLOOR = -10.3  # no float32


def stairs(x0, condition):
    """-5 above zero, -50 just below it, impossible further down."""
    below = torch.where(x0[:, 0] > -0.5, -50.0, -torch.inf)
    return torch.where(x0[:, 0] > 0, -5.0, below)


def test_no_impossible_point_is_worth_more_than_a_possible_one():
    found, floored = score(
        new_task(stairs), torch.tensor([[1.0], [-0.1], [-1.0]]), None, floor=FLOOR
    )
    assert torch.equal(found, torch.tensor([-5.0, FLOOR, FLOOR])) and floored == 2


def test_points_at_the_floor_are_no_estimate_of_log_z_and_teach_no_look_ahead():
    tuned = Finetuner(
        new_task(stairs),
        ScalarLogZ(),
        FinetuneSettings(**SETTINGS, log_reward_floor=FLOOR),
        generator=seeded(),
        look_ahead=True,
    )
    metrics = tuned.update(0)
    possible = 64 - metrics["rtb/floored"]
    assert 10 < possible < 54 and float(metrics["rtb/log_z"]) == -5
    assert tuned.control.sums[1:, 0, 0].tolist() == [possible] * 2


def test_a_start_may_do_without_warming_up():
    task = new_task(lambda x0, c: x0[:, 0])
    draws = RewardedDraws.of_one_prior(task, torch.randn(50, 1, generator=seeded()), None, 1.0)
    settings = RewardedSettings(steps=2, warmup=0)
    RewardedTrainer(task, draws, 1.0, settings, generator=seeded()).update(0)
    assert float(task.posterior.at.detach()) != 0
