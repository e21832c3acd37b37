"""Adjoint matching: the adjoint is a derivative, the optimum a control in closed form."""

import dataclasses

import pytest
import torch
from affine_chain import (
    CONCAVE,
    DIFFUSION,
    LEVELS,
    LINEAR,
    ONE,
    PRIOR,
    PRIOR_CHAIN,
    SCHEDULE,
    ZERO,
    FreeSteps,
    make_task,
    moments,
    quadrature,
    seeded,
    tilted,
)
from torch import Tensor, nn

from rtb_rl.baselines.adjoint import (
    AdjointMatching,
    input_adjoint,
    output_adjoint,
    reward_gradient,
    wanted_steps,
)
from rtb_rl.baselines.trainer import BaselineSettings
from rtb_rl.core import GaussianDiffusion, ScaledPrediction, StartStep, Trajectory, rollout
from rtb_rl.core.gaussian import large_spread
from rtb_rl.errors import InputError, NonFiniteError
from rtb_rl.tasks.toy import Chain, chain_of, gaussian_chain, shared_spread
from rtb_rl.training import Run, Task, train


def make_trainer(task, seed=0, adjoint_of_step=output_adjoint, **settings):
    settings = {"conditions": 1, "paths": 64, "learning_rate": 1e-2} | settings
    return AdjointMatching(
        task,
        BaselineSettings(**settings),
        generator=seeded(seed),
        adjoint_of_step=adjoint_of_step,
    )


class Curved(nn.Module):
    """A prior that is not affine, and whose spread depends on the point."""

    def forward(self, x, level, condition):
        mixed = torch.sin(x + 0.3 * level[:, None].to(x.dtype)) + 0.4 * x.flip(1)
        return ScaledPrediction(mixed, 0.3 * torch.cos(x - x.flip(1) ** 2))


def test_the_adjoint_is_the_derivative_of_the_reward_by_each_point_of_the_path():
    """Against central differences of the prior's own path at fixed noise, over every level."""
    diffusion = GaussianDiffusion(SCHEDULE, (2,), large_spread(SCHEDULE), dtype=torch.float64)
    prior, beta = Curved(), 2.5
    noise = torch.randn((LEVELS + 1, 6, 2), generator=seeded(0), dtype=torch.float64)

    def end_of(x, k):
        """x[0] of the paths that pass through x at level k."""
        for level in range(k, 0, -1):
            levels = torch.full((6,), level)
            kernel = diffusion.kernel(prior(x, levels, None), x, levels)
            x = kernel.mean + kernel.std * noise[level - 1]
        return x

    def loss(x0):
        return -beta * (torch.sin(x0[:, 0]) * x0[:, 1] + x0[:, 1] ** 2)

    path = [noise[LEVELS]]
    for k in range(LEVELS, 0, -1):
        levels = torch.full((6,), k)
        kernel = diffusion.kernel(prior(path[-1], levels, None), path[-1], levels)
        path.append(kernel.mean + kernel.std * noise[k - 1])
    paths = Trajectory(torch.stack(path[::-1]))
    task = Task("curved", diffusion, prior, Curved(), lambda x0, c: loss(x0) / -beta)
    _, gradient = reward_gradient(task, paths.x0, None, chunk=4)
    seen = []

    def keep(output, carried):
        seen.append(carried)
        return output

    wanted_steps(diffusion, prior, paths, -beta * gradient, adjoint_of_step=keep, chunk=4)
    for k, adjoint in enumerate([-beta * gradient, *seen]):
        for i in range(2):
            step = torch.zeros(6, 2).double()
            step[:, i] = 1e-5
            up, down = (loss(end_of(paths.x[k] + sign * step, k)) for sign in (1, -1))
            torch.testing.assert_close(adjoint[:, i], (up - down) / 2e-5, rtol=1e-6, atol=1e-7)


def wanted_on(paths: Trajectory, reward, choice):
    task = make_task(reward, scaled=False)
    _, gradient = reward_gradient(task, paths.x0, None, chunk=10_000)
    return wanted_steps(DIFFUSION, PRIOR, paths, -gradient, adjoint_of_step=choice, chunk=10_000)


def mean_of(chain: Chain, x: Tensor) -> Tensor:
    """The chain's mean of each step of paths x: [K, batch, 1]."""
    return torch.stack([chain.slope[k - 1] * x[k] + chain.shift[k - 1] for k in range(1, len(x))])


def test_for_a_linear_reward_every_path_wants_the_exact_posterior():
    """The adjoint is then the same on every path: no variance, whoever drew the path."""
    paths = Trajectory(3 * torch.randn((LEVELS + 1, 50, 1), generator=seeded(0)).double())
    exact = mean_of(tilted(LINEAR), paths.x)
    wanted = wanted_on(paths, LINEAR, output_adjoint)
    torch.testing.assert_close(wanted.mean, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wanted.std, PRIOR_CHAIN.std[:, None].expand_as(wanted.std))
    late = wanted_on(paths, LINEAR, input_adjoint)
    prior, slope = mean_of(PRIOR_CHAIN, paths.x), PRIOR_CHAIN.slope[:, None]
    torch.testing.assert_close(late.mean - prior, (exact - prior) * slope, rtol=1e-9, atol=1e-12)


def expected_gradient(model: FreeSteps, reward, choice) -> Tensor:
    """E of the gradient over the model's own paths, by quadrature."""
    paths, weight = quadrature(model)
    wanted = wanted_on(paths, reward, choice)
    model.zero_grad()
    for k in range(1, LEVELS + 1):
        level = torch.full((len(weight),), k)
        kernel = DIFFUSION.kernel(model(paths.x[k], level, None), paths.x[k], level)
        error = ((kernel.mean - wanted.mean[k - 1]) / wanted.std[k - 1]).square().sum(1) / 2
        (weight * error).sum().backward()
    return torch.cat([model.slope.grad.flatten(), model.shift.grad.flatten()])


@pytest.mark.parametrize("reward", [LINEAR, CONCAVE])
def test_the_optimal_control_is_stationary_for_the_output_adjoint_alone(reward):
    """With the prior's spread, the best means are those of the tilted chain (certainty
    equivalence).
    """
    best = FreeSteps(tilted(reward), scaled=False)
    assert expected_gradient(best, reward, output_adjoint).abs().max() < 1e-10
    assert expected_gradient(best, reward, input_adjoint).abs().max() > 0.1
    prior = FreeSteps(PRIOR_CHAIN, scaled=False)
    assert expected_gradient(prior, reward, output_adjoint).abs().max() > 0.1


def moved_by_input_adjoint(levels: int) -> float:
    """How far it moves the mean of N(1, 1/4) under a linear reward, of what is right."""
    toy = gaussian_chain(
        ONE, ONE / 4, LINEAR, levels=levels, posterior=shared_spread(generator=seeded(0))
    )
    chain = chain_of(toy.task.diffusion, toy.task.prior)
    carried = torch.cat([ONE[None], chain.slope.cumprod(0)[:-1]])
    moved = (carried * chain.std).square()
    return float((moved * chain.slope).sum() / moved.sum())


def test_the_input_adjoint_falls_short_and_less_with_more_levels():
    """The figures in the module's docstring."""
    found = [moved_by_input_adjoint(levels) for levels in (3, 10, 20, 50, 100)]
    assert found == pytest.approx([0.22, 0.64, 0.80, 0.92, 0.96], abs=0.005)


def trained(task: Task, choice, updates=120) -> tuple[float, float]:
    """Mean and variance of x[0] after training."""
    settings = {"learning_rate": 5e-2, "last_learning_rate": 0.02, "average_decay": 0.97}
    trainer = make_trainer(task, adjoint_of_step=choice, paths=64, updates=updates, **settings)
    for step in range(updates):
        trainer.update(step)
    return moments(trainer.average.module)


def test_training_finds_the_posterior_of_a_linear_reward():
    """N(1 + 1.5 / 4, 1 / 4); the input adjoint moves the mean by 0.11 where 0.375 is right."""
    found = trained(make_task(LINEAR, scaled=False), output_adjoint)
    assert found == pytest.approx((1.375, 0.25), abs=2e-3)
    short, _ = trained(make_task(LINEAR, scaled=False), input_adjoint)
    assert short == pytest.approx(1.109, abs=5e-3)


def test_training_finds_the_mean_of_a_concave_reward_and_keeps_steps_as_wide_as_the_prior_s():
    found = trained(make_task(CONCAVE, scaled=False), output_adjoint)
    best = moments(FreeSteps(tilted(CONCAVE), scaled=False))
    assert found == pytest.approx(best, abs=0.01)
    exact_mean, exact_variance = (float(m) for m in tilted(CONCAVE).final(ZERO, ONE))
    assert best[0] == pytest.approx(exact_mean) and best[1] > 1.3 * exact_variance


def accumulated(trainer, paths, levels) -> Tensor:
    model = trainer.task.posterior
    _, gradient = reward_gradient(trainer.task, paths.x0, None, chunk=trainer.settings.chunk)
    chunk = trainer.settings.chunk
    wanted = wanted_steps(
        DIFFUSION, PRIOR, paths, -gradient, adjoint_of_step=output_adjoint, chunk=chunk
    )
    model.zero_grad()
    trainer.accumulate(paths, wanted, levels)
    return torch.cat([model.slope.grad.flatten(), model.shift.grad.flatten()])


def test_subsets_of_the_levels_average_to_the_whole_gradient_whatever_the_chunk():
    paths = rollout(DIFFUSION, PRIOR, None, 20, generator=seeded(1))
    trainer = make_trainer(make_task(CONCAVE, scaled=False))
    whole = accumulated(trainer, paths, trainer.learner.levels(20))
    pairs = torch.tensor([[1, 2], [1, 3], [2, 3]])
    subsets = [accumulated(trainer, paths, pair[:, None].expand(-1, 20)) for pair in pairs]
    torch.testing.assert_close(torch.stack(subsets).mean(0), whole, rtol=1e-9, atol=1e-12)
    cut = make_trainer(make_task(CONCAVE, scaled=False), chunk=7)
    again = accumulated(cut, paths, cut.learner.levels(20))
    torch.testing.assert_close(again, whole, rtol=1e-9, atol=1e-12)


def test_beta_scales_what_is_wanted_and_calls_are_counted():
    moved = []
    for beta in (1.0, 3.0):
        task = make_task(LINEAR, scaled=False)
        trainer = make_trainer(task, beta=beta, paths=10, levels_per_path=2, gradient_clip=1e9)
        metrics = trainer.update(0)
        moved.append(task.posterior.shift.grad)
    torch.testing.assert_close(moved[1], 3 * moved[0])  # linear in beta while at the prior
    forward, adjoint, regression = 10 * LEVELS, 10 * LEVELS * 3, 10 * 2 * 3
    assert trainer.calls == metrics["adjoint/calls"] == forward + adjoint + regression
    assert all(p.grad is None for p in task.prior.parameters())


def test_resumed_training_is_bit_equal(tmp_path):
    def fit(directory, stop_at=None):
        settings = {"paths": 16, "levels_per_path": 2, "updates": 12, "last_learning_rate": 0.1}
        trainer = make_trainer(make_task(CONCAVE, scaled=False), **settings)

        def update(step):
            if step == stop_at:
                raise KeyboardInterrupt
            return trainer.update(step)

        run, every = Run(directory, {}), {"log_every": 2, "checkpoint_every": 4}
        train(run, update, trainer.parts, steps=12, description="toy", **every)
        return trainer.average.module.state_dict()

    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", stop_at=7)
    resumed = fit(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]


def test_each_path_is_steered_by_its_own_condition():
    """log r = c x[0]: the gradient by x[0] is the condition, the same for paths of one."""

    class Ignoring(FreeSteps):
        def forward(self, x, level, condition):
            assert condition["slope"].shape == (len(x), 1)
            return super().forward(x, level, None)

    def draw(n, *, generator):
        return {"slope": torch.arange(float(n)).double()[:, None]}, None

    task = dataclasses.replace(
        make_task(LINEAR, scaled=False),
        posterior=Ignoring(PRIOR_CHAIN, scaled=False),
        log_reward=lambda x0, condition: (condition["slope"] * x0).sum(1),
        draw_conditions=draw,
    )
    trainer = make_trainer(task, conditions=4, paths=3)
    paths = trainer.learner.draw()
    _, gradient = reward_gradient(task, paths.x0, paths.condition, chunk=5)
    assert torch.equal(gradient[:, 0], torch.arange(4.0).double().repeat_interleave(3))
    trainer.update(0)


@pytest.mark.parametrize(
    "log_reward",
    [
        lambda x0, c: x0.detach().sum(1),
        torch.no_grad()(lambda x0, c: x0.sum(1)),
        lambda x0, c: torch.ones(len(x0), requires_grad=True) * 2,
    ],
)
def test_a_reward_without_gradient_is_refused(log_reward):
    task = dataclasses.replace(make_task(LINEAR, scaled=False), log_reward=log_reward)
    with pytest.raises(InputError, match="'affine' has no gradient by the points"):
        make_trainer(task).update(0)


def test_a_reward_of_another_shape_or_without_finite_gradient_stops():
    task = make_task(LINEAR, scaled=False)
    column = dataclasses.replace(task, log_reward=lambda x0, c: x0)
    with pytest.raises(InputError, match=r"returned \(64, 1\) for 64 points"):
        make_trainer(column).update(0)
    kink = dataclasses.replace(task, log_reward=lambda x0, c: (x0.sum(1) * 0).sqrt())
    with pytest.raises(NonFiniteError, match="the gradient of log_reward of task 'affine'"):
        make_trainer(kink).update(0)


class Detached(nn.Module):
    """The prior as a module that computes without graph."""

    @torch.no_grad()
    def forward(self, x, level, condition):
        return PRIOR(x, level, condition)


def test_a_prior_or_a_spread_that_can_t_be_steered_is_refused():
    with pytest.raises(InputError, match="prior's prediction has no gradient"):
        task = make_task(LINEAR, scaled=False)
        make_trainer(dataclasses.replace(task, prior=Detached())).update(0)
    with pytest.raises(InputError, match="steps of another spread than its prior"):
        make_trainer(make_task(CONCAVE, scaled=True, chain=tilted(CONCAVE))).update(0)
    with pytest.raises(InputError, match="needs a GaussianDiffusion, not StartStep"):
        other = dataclasses.replace(task, diffusion=StartStep(DIFFUSION))
        make_trainer(other)
