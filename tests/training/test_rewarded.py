"""The start from rewarded draws against closed forms of Gaussian data, exponentially tilted.

Data N(0, 1) and the exact denoiser E[x_0 | x_k] = signal x_k, with variance noise^2 around it. Of
r = exp(a x_0) the target is N(a, 1), log Z is a^2 / 2, and the target's denoiser is the prior's
moved by a noise^2, at every level.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from rtb_rl.core import GaussianDiffusion, StartStep, log_snr_schedule, zero_terminal_signal
from rtb_rl.core.gaussian import large_spread
from rtb_rl.errors import InputError
from rtb_rl.training import Task
from rtb_rl.training.rewarded import RewardedSettings, RewardedTrainer
from rtb_rl.training.rewarded_draws import RewardedDraws, coupled_choice
from rtb_rl.training.scoring import LOG_REWARD_FLOOR

LEVELS, TILT = 4, 0.8
SCHEDULE = zero_terminal_signal(log_snr_schedule(LEVELS))
DIFFUSION = GaussianDiffusion(SCHEDULE, (2,), large_spread(SCHEDULE), dtype=torch.float64)
DRAWS = 20_000
SLOPES = torch.tensor([TILT, -0.5, 0.0], dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """E[x_0 | x_k] of such data, or so much more at each level and row if it is trained."""

    def __init__(self, rows=1):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(rows, LEVELS + 1, 2, dtype=torch.float64))

    def forward(self, x, level, condition):
        row = torch.zeros_like(level) if condition is None else condition
        return SCHEDULE.signal[level, None] * x + self.shift[row, level]


def linear(x0, condition):
    slope = TILT if condition is None else SLOPES[condition]
    return slope * x0[:, 0]


def constant(x0, condition):
    return torch.full((len(x0),), 3.0, dtype=x0.dtype)


def trainer_of(log_reward, settings, condition=None, diffusion=DIFFUSION, **given):
    prior = Linear(rows=1 if condition is None else len(condition))
    task = Task("linear", diffusion, prior, copy.deepcopy(prior), log_reward)
    x0 = torch.randn(DRAWS, 2, dtype=torch.float64, generator=seeded(1))
    draws = RewardedDraws.of_one_prior(task, x0, condition, 1.0)
    return RewardedTrainer(task, draws, 1.0, settings, generator=seeded(), **given)


def trained(trainer):
    for step in range(trainer.settings.steps):
        trainer.update(step)
    return trainer.average.module.shift[:, 1:].detach()


def wanted(slope):
    return slope * SCHEDULE.noise[1:].square()


THOROUGH = RewardedSettings(
    steps=800, batch=512, learning_rate=0.02, gradient_clip=1e3, input_rate=1.0
)


def test_it_ends_in_the_denoiser_of_the_target():
    found = trained(trainer_of(linear, THOROUGH))[0]
    torch.testing.assert_close(found[:, 0], wanted(TILT), atol=0.04, rtol=0)
    torch.testing.assert_close(found[:, 1], torch.zeros(LEVELS).double(), atol=0.04, rtol=0)


@pytest.mark.parametrize("conditions", [3, 2])
def test_every_condition_has_its_own_target(conditions):
    """Whether a draw is weighed for all of them or for some at random."""
    trainer = trainer_of(linear, replace(THOROUGH, conditions=conditions), torch.arange(3))
    torch.testing.assert_close(trainer.draws.log_z, SLOPES.square() / 2, atol=0.03, rtol=0)
    found = trained(trainer)
    for row, slope in enumerate(SLOPES):
        torch.testing.assert_close(found[row, :, 0], wanted(slope), atol=0.06, rtol=0)


def test_draws_of_several_priors_are_weighed_for_their_own_alone():
    """The prior of row c is N(c, 1): of exp(a x_0) log Z is a c + a^2 / 2."""
    means = torch.tensor([0.0, 2.0], dtype=torch.float64)
    x0 = torch.randn(2, DRAWS, 1, dtype=torch.float64, generator=seeded()) + means[:, None, None]
    draws = RewardedDraws.of_each_prior(x0, torch.arange(2), TILT * x0[..., 0], 1.0)
    torch.testing.assert_close(draws.log_z, TILT * means + TILT**2 / 2, atol=0.03, rtol=0)
    some, rows, log_weight, _ = draws.sample(1000, 4, generator=seeded())
    assert rows.shape == log_weight.shape == (1000, 1)
    assert float((some[:, 0] - means[rows[:, 0]]).abs().max()) < 5
    expected = TILT * some[:, 0] - draws.log_z[rows[:, 0]]
    torch.testing.assert_close(log_weight[:, 0], expected)


@pytest.mark.parametrize("condition", [None, torch.arange(3)])
def test_a_constant_reward_moves_nothing(condition):
    """Weight and guess are equal for every draw: no noise is left, to the last bit."""
    trainer = trainer_of(constant, RewardedSettings(steps=20), condition)
    for step in range(20):
        metrics = trainer.update(step)
        assert float(metrics["start/loss"]) == float(metrics["start/gradient_norm"]) == 0
    assert (trainer.task.posterior.shift == 0).all()


def gradients(trainer):
    """d loss / d shift over batches, one a seed: [seeds, levels]."""
    found = []
    for seed in range(60):
        trainer.generator.manual_seed(seed)
        trainer.task.posterior.shift.grad = None
        trainer.loss(512).backward()
        found.append(trainer.task.posterior.shift.grad[0, 1:, 0].clone())
    return torch.stack(found)


def test_the_guess_takes_noise_away_and_moves_nothing(monkeypatch):
    trainer = trainer_of(linear, RewardedSettings())
    with_guess = gradients(trainer)
    impossible = torch.full((512,), LOG_REWARD_FLOOR, dtype=torch.float64)
    monkeypatch.setattr("rtb_rl.training.rewarded.score", lambda *given: (impossible, 0))
    without = gradients(trainer)
    difference = (with_guess - without).mean(0).abs()
    assert (difference < 4 * (with_guess - without).std(0) / 60**0.5).all()
    assert with_guess.std(0)[0] < 0.5 * without.std(0)[0]


def test_a_guess_knows_nothing_but_its_own_point():
    """Bounded by the other draws of its batch it would know of its own x_0, and bias the loss."""
    trainer = trainer_of(linear, RewardedSettings())
    most = trainer.draws.log_weight.max()
    for _ in range(20):
        drawn = trainer._draw(torch.full((4,), 2))
        expected = (TILT * drawn.before[:, 0] - trainer.draws.log_z).clamp(max=most).exp()
        torch.testing.assert_close(drawn.guess, expected)


def test_draws_of_weight_are_seen_oftener_and_move_nothing(monkeypatch):
    """Means stay what they are, and a rare draw of great weight takes no batch away."""
    trainer = trainer_of(
        lambda x0, condition: torch.where(x0[:, 0] > 2, 5.0, 0.0).double(), RewardedSettings()
    )
    by_weight = gradients(trainer)
    draws = trainer.draws
    some = draws.sample(50_000, 1, generator=seeded())
    weight = some.correction * some.log_weight[:, 0].exp()
    assert float(draws.log_weight.max().exp()) > 10
    assert float(weight.max()) < 2
    for found in (some.correction, weight):
        assert float(found.mean()) == pytest.approx(1, abs=0.02)
    monkeypatch.setitem(vars(draws), "_share", torch.ones(DRAWS, dtype=torch.float64))
    plain = gradients(trainer)
    difference = (by_weight.mean(0) - plain.mean(0)).abs()
    assert (difference < 4 * ((by_weight.var(0) + plain.var(0)) / 60).sqrt()).all()
    assert (by_weight.std(0)[2:] < 0.4 * plain.std(0)[2:]).all()  # elsewhere the guess knows


def test_a_level_weighs_by_its_noise_and_by_what_its_errors_cost_the_paths():
    """n = 2 noise^2, and a squared error costs c^2 / (2 s^2) nats, in all no more than 1."""
    trainer = trainer_of(linear, RewardedSettings())
    noise = 2 * SCHEDULE.noise[1:].square()
    cost = (DIFFUSION.weight_x0 / DIFFUSION.std).flatten()[1:].square() / 2
    nats = (cost * noise).clamp(max=1.0).sqrt()
    expected = nats / noise / nats.mean()
    torch.testing.assert_close(trainer.level_weight[1:], expected, atol=0, rtol=0.35)
    assert float(trainer.level_weight[0]) == 0


def test_a_step_of_next_to_no_spread_outweighs_no_other():
    """At a floor of 1e-6 an error of level 1 would cost a million times what it does elsewhere."""
    std = DIFFUSION.std.flatten()[1:].clone()
    std[0] = 1e-6
    narrow = trainer_of(linear, RewardedSettings(), diffusion=DIFFUSION.with_spread(std))
    usual = trainer_of(linear, RewardedSettings())
    torch.testing.assert_close(narrow.level_weight, usual.level_weight, atol=0, rtol=0.1)


def test_new_inputs_learn_at_a_rate_of_their_own():
    """The first step of Adam is the rate itself."""
    settings = RewardedSettings(learning_rate=1e-3, warmup=1, input_rate=30.0)
    task = trainer_of(linear, settings).task
    draws = RewardedDraws.of_one_prior(task, torch.randn(50, 2).double(), None, 1.0)
    new = list(task.posterior.parameters())
    trainer = RewardedTrainer(task, draws, 1.0, settings, new_inputs=new, generator=seeded())
    trainer.update(0)
    moved = task.posterior.shift[0, 1:, 0].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.03), rtol=1e-3, atol=0)


def test_choices_have_their_laws_and_differ_as_seldom_as_can_be():
    n = 40_000
    first = torch.tensor([0.5, 0.3, 0.2, 0.0]).expand(n, 4)
    second = torch.tensor([0.2, 0.3, 0.1, 0.4]).expand(n, 4)
    one, other = coupled_choice(first, second, generator=seeded())
    torch.testing.assert_close(one.bincount(minlength=4) / n, first[0], atol=0.01, rtol=0)
    torch.testing.assert_close(other.bincount(minlength=4) / n, second[0], atol=0.01, rtol=0)
    assert float((one != other).float().mean()) == pytest.approx(0.4, abs=0.01)
    one, other = coupled_choice(first, first, generator=seeded())
    assert torch.equal(one, other)


def test_another_diffusion_is_refused():
    with pytest.raises(InputError, match="needs a GaussianDiffusion, not StartStep"):
        trainer_of(linear, RewardedSettings(), diffusion=StartStep(DIFFUSION))
