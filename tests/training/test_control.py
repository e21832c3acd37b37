"""What LookAhead takes from the weights of steps: no bias, less noise, nothing off-policy."""

import copy
import itertools

import pytest
import torch
from torch import nn

from rtb_rl.core import (
    GaussianDiffusion,
    GroupMeanLogZ,
    ScalarLogZ,
    Schedule,
    Trajectory,
    VelocityPrediction,
    backward_in_chunks,
    log_snr_schedule,
    rtb,
    zero_terminal_signal,
)
from rtb_rl.core.gaussian import large_spread
from rtb_rl.errors import InputError
from rtb_rl.nn import ResidualMLP
from rtb_rl.training import Finetuner, FinetuneSettings, Mix, Run, Task, train
from rtb_rl.training.control import LookAhead
from rtb_rl.training.paths import Part, merge

LEVELS = 12


class Shifted(nn.Module):
    """Predicts a learned multiple of x, plus a learned number."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
        self.offset = nn.Parameter(torch.tensor(-0.2, dtype=torch.float64))

    def forward(self, x, level, condition):
        return self.slope * x + self.offset


def every_path(posterior, diffusion):
    """Paths of two steps whose eps run through all patterns of -1 and +1."""
    eps = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=torch.float64)
    x = [eps[:, :1]]
    for level in (2, 1):
        levels = torch.full((len(eps),), level)
        with torch.no_grad():
            kernel = diffusion.kernel(posterior(x[-1], levels, None), x[-1], levels)
        x.append(kernel.mean + kernel.std * eps[:, [3 - level]])
    return Trajectory(torch.stack(x[::-1]))


def gradient(control, paths, diffusion, weight):
    posterior = Shifted()
    backward_in_chunks(diffusion, posterior, paths, weight, chunk=3, control=control)
    return torch.stack([posterior.slope.grad, posterior.offset.grad])


def test_no_guess_biases_the_gradient_of_on_policy_paths():
    schedule = Schedule(torch.tensor([1.0, 0.7, 0.0], dtype=torch.float64))
    diffusion = GaussianDiffusion(schedule, (1,), large_spread(schedule), dtype=torch.float64)
    paths = every_path(Shifted(), diffusion)
    weight = (paths.x0 - 0.3).square().squeeze(1)
    wanted = gradient(None, paths, diffusion, weight)

    def guess(prediction, level, condition, path):
        return 3.0 + level + prediction.squeeze(1).sin() + paths.x[level, path].squeeze(1).exp()

    found = gradient(guess, paths, diffusion, weight)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    shifted = Trajectory(paths.x + torch.tensor([0.1, 0.0, 0.0]).reshape(3, 1, 1))
    off_policy = gradient(guess, shifted, diffusion, weight)
    assert (off_policy - gradient(None, shifted, diffusion, weight)).abs().max() > 0.1


def two_sided_task():
    """A reward of two levels far apart, by the sign of one of two coordinates."""
    generator = torch.Generator().manual_seed(1)
    schedule = zero_terminal_signal(log_snr_schedule(LEVELS))
    diffusion = GaussianDiffusion(schedule, (2,), large_spread(schedule))
    network = ResidualMLP(2, LEVELS, width=16, generator=generator)
    network.last.weight.data.normal_(std=0.1, generator=generator)
    prior = VelocityPrediction(network, schedule)
    return Task("sides", diffusion, prior, copy.deepcopy(prior), lambda x0, c: 5 * x0[:, 0].sign())


ON_POLICY = Mix(on_policy=1, data=0)


def finetuner(look_ahead, mix=ON_POLICY, log_z=None, **settings):
    settings = {"conditions": 64, "beta_warmup": 1, "levels_per_path": None} | settings
    return Finetuner(
        two_sided_task(),
        log_z or ScalarLogZ(),
        FinetuneSettings(mix=mix, **settings),
        generator=torch.Generator().manual_seed(3),
        look_ahead=look_ahead,
    )


def spread_of_gradients(look_ahead, updates, **given):
    """Mean square distance of the gradient to its mean, over updates that change nothing."""
    still = {"learning_rate": 0.0, "gradient_clip": 1e9, "log_z_learning_rate": 0.0}
    trainer = finetuner(look_ahead, **still, **given)
    gradients = []
    for step in range(updates):
        trainer.update(step)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.trained]))
    held = torch.stack(gradients[5:])
    return float(held.var(0).sum()), held.mean(0)


def test_the_gradient_keeps_its_mean_and_loses_most_of_its_noise():
    plain, mean = spread_of_gradients(False, 65)
    quiet, same = spread_of_gradients(True, 65)
    assert quiet < 0.5 * plain
    assert float((mean - same).square().sum()) < 2 * (plain + quiet) / 60


def test_the_mean_of_pairs_biases_no_guess():
    """A guess that is told the mean of the pair knows half of what the path itself is worth."""
    pairs = {"mix": Mix(on_policy=2, data=0), "log_z": GroupMeanLogZ(2), "conditions": 32}
    plain, mean = spread_of_gradients(False, 65, **pairs)
    quiet, same = spread_of_gradients(True, 65, **pairs)
    assert float((mean - same).square().sum()) < 2 * (plain + quiet) / 60


def test_the_first_update_knows_no_slope_and_is_unchanged():
    states = []
    for look_ahead in (False, True):
        trainer = finetuner(look_ahead)
        trainer.update(0)
        states.append(trainer.task.posterior.state_dict())
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(one, other)


def part(x, log_ratio, log_reward, on_policy, so_far):
    return Part(Trajectory(x), log_ratio, log_reward, on_policy, so_far)


def test_paths_of_other_sources_keep_their_weights():
    trainer = finetuner(True, mix=Mix(1, prior=1, data=0), conditions=4)
    for step in range(3):
        trainer.update(step)
    drawn = merge(trainer.paths.draw(), 4)
    here = torch.tensor([True, False] * 4)  # a condition's paths are neighbours
    assert torch.equal(drawn.on_policy, here)
    assert drawn.so_far[:, ~here].abs().max() == 0
    control = trainer.control
    control.begin(drawn, torch.ones(8), torch.zeros(8), 1.0, -1e6)
    seen = control(torch.ones(8, 2), torch.full((8,), 3), None, torch.arange(8))
    assert seen[~here].abs().max() == 0 and seen[here].abs().min() > 0


def observed(control, level, past, rest, seen):
    """Shows the control paths at a level: residual past + rest, log Z 0."""
    count, levels = len(past), LEVELS + 1
    so_far = torch.zeros(levels, count)
    so_far[level] = past
    # by rewards of 5 sign(x): what is seen ahead is in the sign of the prediction
    prediction = torch.stack([-seen.sign(), torch.zeros(count)], 1)
    log_reward = torch.zeros(count)
    total = past + rest
    drawn = part(torch.zeros(levels, count, 2), total, log_reward, torch.ones(count).bool(), so_far)
    control.begin(drawn, 2 * total / count, torch.zeros(count), 1.0, -1e6)
    return control(prediction, torch.full((count,), level), None, torch.arange(count))


def test_what_is_settled_and_what_is_foreseen_are_guessed_exactly():
    """Residuals past + a - past / 2 + 0.6 f: a regression on past and f knows all of them."""
    control, level = LookAhead(two_sided_task(), rtb()), 4
    generator = torch.Generator().manual_seed(0)
    for update in range(12):
        past = torch.randn(400, generator=generator)
        seen = 5 * torch.randn(400, generator=generator).sign()
        rest = 1.5 - past / 2 + 0.6 * seen
        guess = observed(control, level, past, rest, seen)
        if update == 0:
            assert guess.abs().max() == 0
    torch.testing.assert_close(guess, 2 * (past + rest) / 400, rtol=0, atol=2e-4)


def test_impossible_points_teach_it_nothing():
    control = LookAhead(two_sided_task(), rtb())
    count = 6
    drawn = part(
        torch.zeros(LEVELS + 1, count, 2),
        torch.zeros(count),
        torch.tensor([0.0, -1e6] * 3),
        torch.ones(count).bool(),
        torch.zeros(LEVELS + 1, count),
    )
    control.begin(drawn, torch.ones(count), torch.zeros(count), 1.0, -1e6)
    control(torch.ones(count, 2), torch.full((count,), 2), None, torch.arange(count))
    assert float(control.sums[2, 0, 0]) == 3 and float(control.sums[2, 0, 3]) == 0


def test_a_group_is_told_nothing_of_the_path_itself():
    """With the group's mean as log Z a guess would know of the path's own end."""
    weight = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 8.0])
    others = GroupMeanLogZ(3).of_others(weight)
    assert others.tolist() == [4.0, 3.5, 1.5, 6.5, 6.5, 5.0]


def test_slopes_survive_an_interruption(tmp_path):
    def weights(directory, *steps):
        for end in steps:
            trainer = finetuner(True, conditions=8)
            run = Run(directory, {})
            train(run, trainer.update, trainer.parts, steps=end, description="t",
                  checkpoint_every=2)  # fmt: skip
        return trainer.task.posterior.state_dict()

    whole, parts = weights(tmp_path / "whole", 6), weights(tmp_path / "parts", 4, 6)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_prediction_that_is_no_point_is_refused():
    control = LookAhead(two_sided_task(), rtb())
    zero = torch.zeros(2)
    drawn = part(torch.zeros(3, 2, 2), zero, zero, zero.bool(), torch.zeros(3, 2))
    control.begin(drawn, torch.ones(2), zero, 1.0, -1e6)
    with pytest.raises(InputError, match="needs a predicted x0"):
        control(object(), torch.tensor([1, 2]), None, torch.arange(2))
