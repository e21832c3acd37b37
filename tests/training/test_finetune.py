"""The RTB loop: where paths come from, what is shared within a group, what gets a gradient."""

import copy
import dataclasses
import importlib.util
import math

import pytest
import torch
from torch import nn

from rtb_rl.core import (
    ConditionalLogZ,
    GaussianDiffusion,
    GroupMeanLogZ,
    ScalarLogZ,
    Schedule,
    VelocityPrediction,
    log_ratio,
    log_snr_schedule,
    zero_terminal_signal,
)
from rtb_rl.core.gaussian import large_spread
from rtb_rl.errors import InputError, NonFiniteError
from rtb_rl.nn import MLP, LearnedSpread, ResidualMLP
from rtb_rl.training import Finetuner, FinetuneSettings, Mix, Run, Task, diagnose, train, trust
from rtb_rl.training.optimisers import eight_bit_adamw
from rtb_rl.training.paths import merge

LEVELS = 6
SCHEDULE = zero_terminal_signal(log_snr_schedule(LEVELS))


def make_task(log_reward=None, levels=LEVELS, condition=True):
    """Two coordinates given one number; an untrained network as the prior."""
    generator = torch.Generator().manual_seed(1)
    schedule = zero_terminal_signal(log_snr_schedule(levels))
    diffusion = GaussianDiffusion(schedule, (2,), large_spread(schedule))
    network = ResidualMLP(2, levels, condition_size=int(condition), width=16, generator=generator)
    network.last.weight.data.normal_(std=0.1, generator=generator)
    prior = VelocityPrediction(network, schedule)
    posterior = LearnedSpread(copy.deepcopy(prior), levels=levels, size=2)

    def draw(n, *, generator):
        if not condition:
            return None, None
        return torch.randn((n, 1), generator=generator), torch.randn((n, 2), generator=generator)

    return Task("toy", diffusion, prior, posterior, log_reward or (lambda x0, c: x0.sum(1)), draw)


def conditional_log_z():
    return ConditionalLogZ(MLP(1, 1, width=16, generator=torch.Generator().manual_seed(2)))


def make_finetuner(task, log_z=None, **settings):
    settings = {"conditions": 8, "beta_warmup": 1, "levels_per_path": None} | settings
    return Finetuner(
        task,
        log_z or conditional_log_z(),
        FinetuneSettings(**settings),
        generator=torch.Generator().manual_seed(3),
    )


def test_first_residual_is_log_z_minus_beta_log_r():
    finetuner = make_finetuner(make_task(lambda x0, c: torch.full((len(x0),), 2.0)), beta=3.0)
    metrics = finetuner.update(0)
    assert float(metrics["rtb/log_z"]) == pytest.approx(6.0)
    assert float(metrics["rtb/loss"]) == pytest.approx(0.0, abs=1e-9)


def test_paths_of_a_condition_are_neighbours_with_their_own_endpoints():
    finetuner = make_finetuner(make_task(), mix=Mix(on_policy=2, prior=2, data=1))
    drawn = merge(finetuner.paths.draw(), 8)
    paths, ratio, log_reward = drawn.path, drawn.log_ratio, drawn.log_reward
    groups = paths.condition.reshape(8, 5)
    assert (groups == groups[:, :1]).all() and len(groups[:, 0].unique()) == 8
    endpoints = paths.x0.reshape(8, 5, 2)
    for group in endpoints:
        assert len(group.unique(dim=0)) == 5
    assert torch.equal(log_reward, paths.x0.sum(1))
    assert paths.x.shape == (LEVELS + 1, 40, 2) and not ratio.requires_grad


def test_paths_are_drawn_a_few_at_a_time_and_scored_as_if_together():
    task, seen = make_task(), []
    finetuner = make_finetuner(task, mix=Mix(on_policy=2, data=0), draw_batch=5)
    task.posterior.log_scale.data.add_(0.1)
    task.posterior.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    (drawn,) = finetuner.paths.draw()
    paths, ratio, log_reward = drawn.path, drawn.log_ratio, drawn.log_reward
    assert seen == [5] * 3 * LEVELS + [1] * LEVELS
    expected = log_ratio(task.diffusion, task.posterior, task.prior, paths)
    torch.testing.assert_close(ratio, expected.detach())
    assert torch.equal(log_reward, paths.x0.sum(1))
    assert (paths.condition.reshape(8, 2) == paths.condition.reshape(8, 2)[:, :1]).all()
    assert len(paths.x0.unique(dim=0)) == 16


def test_another_optimiser_descends_and_a_missing_one_is_one_clear_error():
    task = make_task()
    before = copy.deepcopy(task.posterior.state_dict())
    settings = FinetuneSettings(conditions=8, learning_rate=0.5, gradient_clip=1e6)
    generator = torch.Generator().manual_seed(3)
    finetuner = Finetuner(
        task, conditional_log_z(), settings, generator=generator, optimiser=torch.optim.SGD
    )
    finetuner.update(0)
    for name, parameter in task.posterior.named_parameters():
        expected = before[name] - 0.5 * parameter.grad
        torch.testing.assert_close(parameter.detach(), expected)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(InputError, match="pip install bitsandbytes"):
            eight_bit_adamw([])


@pytest.mark.parametrize(
    ("mix", "log_z", "words"),
    [
        (Mix(on_policy=0, data=0), ScalarLogZ(), "at least one path"),
        (Mix(on_policy=-1, data=1), ScalarLogZ(), "no negative"),
        (Mix(on_policy=0, prior=0, data=1, replay=1), ScalarLogZ(), "set mix.on_policy"),
        (Mix(on_policy=2, data=0, replay=1), GroupMeanLogZ(3), "learned log Z"),
        (Mix(on_policy=3, data=0), GroupMeanLogZ(2), "don't divide"),
        (Mix(on_policy=0, data=64), GroupMeanLogZ(64), "shares its endpoint"),
    ],
)
def test_a_mix_that_can_t_be_grouped_is_refused(mix, log_z, words):
    with pytest.raises(InputError, match=words):
        make_finetuner(make_task(), log_z, mix=mix)


def test_data_paths_need_data():
    task = make_task(condition=False)
    with pytest.raises(InputError, match="draws no data"):
        make_finetuner(task, ScalarLogZ(), mix=Mix(on_policy=1, data=1)).update(0)


def test_replayed_points_keep_their_condition_and_reward():
    task = make_task(lambda x0, c: x0.sum(1) + 10 * c[:, 0])
    finetuner = make_finetuner(task, mix=Mix(on_policy=1, data=0, replay=2))
    for step in range(3):
        finetuner.update(step)
    drawn = merge(finetuner.paths.draw(), 8)
    paths, log_reward = drawn.path, drawn.log_reward
    assert paths.x.shape[1] == 8 * 3
    assert torch.allclose(log_reward, paths.x0.sum(1) + 10 * paths.condition[:, 0])
    replayed = paths.condition.reshape(8, 3)[:, 1:]
    assert (replayed != paths.condition.reshape(8, 3)[:, :1]).any()


def test_the_prior_and_the_states_get_no_gradient():
    task = make_task()
    before = copy.deepcopy(task.prior.state_dict())
    finetuner = make_finetuner(task, mix=Mix(on_policy=2, prior=1, data=1))
    for step in range(3):
        finetuner.update(step)
    assert all(p.grad is None for p in task.prior.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), task.prior.state_dict().values()))
    assert not torch.equal(task.posterior.log_scale, torch.zeros_like(task.posterior.log_scale))


def test_beta_rises_to_its_value():
    finetuner = make_finetuner(make_task(), beta=4.0, beta_warmup=4)
    betas = [float(finetuner.update(step)["rtb/beta"]) for step in range(6)]
    assert betas == [1.0, 2.0, 3.0, 4.0, 4.0, 4.0]


def test_a_reward_of_minus_infinity_is_floored_and_nan_stops():
    task = make_task(lambda x0, c: torch.where(x0[:, 0] > 0, 0.0, -math.inf))
    metrics = make_finetuner(task, log_reward_floor=-50.0).update(0)
    assert -50 < float(metrics["rtb/log_reward"]) < 0
    assert metrics["rtb/floored"] == round(-float(metrics["rtb/log_reward"]) * 64 / 50)
    task = make_task(lambda x0, c: x0.sum(1) / 0 * 0)
    with pytest.raises(NonFiniteError, match="is nan at point 0"):
        make_finetuner(task).update(0)


def test_memory_does_not_grow_with_the_number_of_levels():
    largest = {}
    for levels in (4, 32):
        task = make_task(levels=levels)
        rows = []
        task.posterior.register_forward_pre_hook(lambda m, a, rows=rows: rows.append(len(a[0])))
        make_finetuner(task, chunk=16).update(0)
        largest[levels] = max(rows)
    assert largest[4] == largest[32] == 56  # 8 conditions x 7 on-policy paths, in the rollout


@pytest.mark.parametrize(
    "mix", [Mix(), Mix(on_policy=1, prior=2, data=1), Mix(on_policy=2, data=0, replay=1)]
)
def test_resumed_training_is_bit_equal(tmp_path, mix):
    def fit(directory, stop_at=None):
        task = make_task()
        finetuner = make_finetuner(task, mix=mix, levels_per_path=3)

        def update(step):
            if step == stop_at:
                raise KeyboardInterrupt
            return finetuner.update(step)

        train(
            Run(directory, {}),
            update,
            finetuner.parts,
            steps=12,
            description="toy",
            log_every=2,
            checkpoint_every=4,
        )
        return finetuner.average.module.state_dict()

    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", stop_at=7)
    resumed = fit(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(
    ("log_reward", "error", "words"),
    [
        (lambda x0, c: x0, InputError, r"returned \(56, 2\) for 56 points.*shape \(56,\)"),
        (lambda x0, c: 1.0, InputError, "returned float for 56 points; return one"),
        (lambda x0, c: x0[:, 0] + math.inf, NonFiniteError, r"inf at point 0.*return finite log r"),
    ],
)
def test_a_reward_of_the_wrong_shape_or_value_is_one_clear_error(log_reward, error, words):
    with pytest.raises(error, match=words):
        make_finetuner(make_task(log_reward)).update(0)


def test_conditions_of_another_length_are_one_clear_error():
    task = make_task()
    wrong = dataclasses.replace(
        task, draw_conditions=lambda n, *, generator: (torch.zeros(n + 1, 1), torch.zeros(n, 2))
    )
    with pytest.raises(InputError, match="returned 9 conditions where 8 were asked for"):
        make_finetuner(wrong).update(0)


def test_the_learning_rate_falls_linearly_to_its_last():
    finetuner = make_finetuner(
        make_task(), learning_rate=0.5, last_learning_rate=0.2, updates=4, log_z_learning_rate=0.3
    )
    rates = []
    for step in range(4):
        finetuner.update(step)
        rates.append([group["lr"] for group in finetuner.optimiser.param_groups])
    assert [rate for rate, _ in rates] == pytest.approx([0.5, 0.4, 0.3, 0.2])
    assert [rate for _, rate in rates] == [0.3] * 4


def test_widened_paths_are_wider_and_scored_by_the_unwidened_posterior():
    finetuner = make_finetuner(
        make_task(), mix=Mix(on_policy=1, widened=1, data=0), widening=3.0, conditions=2000
    )
    on_policy, widened = finetuner.paths.draw()
    assert widened.path.x0.std() > 1.5 * on_policy.path.x0.std()
    for drawn in (on_policy, widened):
        assert not drawn.log_ratio.any()  # the posterior starts at the prior
    assert on_policy.on_policy.all() and not widened.on_policy.any()


def test_the_bounds_of_on_policy_paths_are_logged():
    task = make_task(lambda x0, c: torch.full((len(x0),), 0.25))
    metrics = make_finetuner(task, beta=2.0).update(0)
    for name in ("elbo", "log_z_importance", "eubo_estimate"):
        assert float(metrics[f"rtb/{name}"]) == pytest.approx(0.5)
    assert float(metrics["rtb/ess"]) == pytest.approx(1.0)


def one_step_task(draw_target=None):
    """Prior N(0, 1), log r = x: log Z = 1/2, target N(1, 1). The posterior is N(0.4, 1)."""
    diffusion = GaussianDiffusion(
        Schedule(torch.tensor([1.0, 0.0], dtype=torch.float64)),
        (1,),
        torch.ones(1),
        dtype=torch.float64,
    )

    class At(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x, level, condition):
            return torch.full_like(x, self.value)

    return Task(
        "one step", diffusion, At(0.0), At(0.4), lambda x0, c: x0[:, 0], draw_target=draw_target
    )


@pytest.mark.parametrize("batch", [None, 7000])
def test_diagnostics_against_closed_forms(batch):
    """KL(N(0.4, 1) | N(1, 1)) = 0.18 on either side of log Z = 1/2."""

    def draw_target(condition, n, *, generator):
        return 1 + torch.randn((n, 1), generator=generator, dtype=torch.float64)

    task, rows = one_step_task(draw_target), []
    task.posterior.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    given = {"samples": 40_000, "batch": batch}
    generator = torch.Generator().manual_seed(0)
    found = diagnose(task, task.posterior, 1.0, **given, generator=generator)
    assert batch is None or max(rows) == batch
    assert found["elbo"] == pytest.approx(0.5 - 0.18, abs=0.01)
    assert found["eubo"] == pytest.approx(0.5 + 0.18, abs=0.01)
    assert found["eubo_standard_error"] == pytest.approx(0.6 / 200, rel=0.05)
    assert abs(found["log_z"] - 0.5) < 4 * found["log_z_standard_error"]
    assert found["ess"] == pytest.approx(math.exp(-0.36), abs=0.02)
    assert found["residual_std"] == pytest.approx(0.6, abs=0.01)
    words = trust(found)
    assert "log Z between 0.3" in words and "upper bound" in words
    assert "effective sample size 0.7" in words and "draws as they are can be biased" in words


def test_the_standard_error_is_that_of_a_mean_over_conditions():
    """Weights exp(0.6 x + 0.08) of x from N(0.4, 1): their relative variance is exp(0.36) - 1."""
    rows, samples = 16, 2500
    task = dataclasses.replace(
        one_step_task(), draw_conditions=lambda n, *, generator: (torch.zeros(n, 1), None)
    )
    generator = torch.Generator().manual_seed(0)
    found = diagnose(task, task.posterior, 1.0, rows=rows, samples=samples, generator=generator)
    expected = math.sqrt((math.exp(0.36) - 1) / (samples * rows))
    assert found["log_z_standard_error"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("shift", [0.1, 0.3, 0.8, 1.7])
def test_draws_are_said_to_do_where_no_mean_can_be_far_off(shift):
    """N(shift, 1) for N(0, 1): effective sample size exp(-shift^2), the mean off by shift."""
    ess = math.exp(-(shift**2))
    bound = math.sqrt(1 / ess - 1)  # in standard deviations
    assert shift <= bound
    shared = {"elbo": 0.0, "log_z": 0.0, "log_z_standard_error": 0.0, "eubo_estimate": 0.0}
    words = trust({**shared, "ess": ess, "signal_left": 0.0, "floored": 0.0})
    assert ("as they are can be biased" in words) == (1 / 3 < bound < 1)
    assert ("draws can be used as they are" in words) == (bound < 1 / 3)
    assert ("far from prior" in words) == (bound > 3)


def test_without_exact_draws_the_upper_value_is_called_an_estimate():
    task = one_step_task()
    found = diagnose(
        task, task.posterior, 1.0, samples=40_000, generator=torch.Generator().manual_seed(0)
    )
    assert "eubo" not in found
    assert found["eubo_estimate"] == pytest.approx(0.68, abs=0.02)
    assert "no bound" in trust(found)


def test_diagnostics_of_the_prior_under_a_constant_reward_are_exact():
    task = make_task(lambda x0, c: torch.full((len(x0),), 0.25))
    found = diagnose(
        task, task.posterior, 2.0, rows=4, samples=8, generator=torch.Generator().manual_seed(0)
    )
    assert found["elbo"] == pytest.approx(0.5) and found["log_z"] == pytest.approx(0.5)
    assert found["ess"] == pytest.approx(1.0) and found["residual_std"] == pytest.approx(0.0)
    assert found["kl"] == 0.0


def test_one_path_an_update_is_trained_from_and_has_no_spread(tmp_path):
    finetuner = make_finetuner(make_task(), conditions=1, mix=Mix(1, data=0))
    run = Run(tmp_path, {})
    train(run, finetuner.update, finetuner.parts, steps=2, description="t", log_every=1)
    assert "rtb/residual_std" not in finetuner.update(2)
    more = make_finetuner(make_task(), conditions=2, mix=Mix(1, data=0)).update(0)
    assert math.isfinite(float(more["rtb/residual_std"]))
