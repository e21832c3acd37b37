"""Policy gradients over denoising steps: what their gradients are, and where they end."""

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
from torch.distributions import Normal, kl_divergence

from rtb_rl.baselines.policy_gradient import PolicyGradient
from rtb_rl.baselines.surrogates import (
    ClippedDdpo,
    Ddpo,
    Dpok,
    Steps,
    gaussian_kl,
    kl_regularised_reinforce,
    leave_one_out,
    noise_difference,
    published_dpok,
    standardised,
)
from rtb_rl.baselines.trainer import BaselineSettings
from rtb_rl.core import (
    GaussianKernel,
    IndependentReveals,
    MaskedDiffusion,
    ScalarLogZ,
    backward_in_chunks,
    linear_masking,
    log_ratio,
)
from rtb_rl.errors import InputError, NonFiniteError
from rtb_rl.tasks.toy import Chain, Quadratic
from rtb_rl.training import Finetuner, FinetuneSettings, Mix, Run, Task, train


def make_trainer(task, surrogate, seed=0, **settings):
    settings = {"conditions": 1, "paths": 64, "learning_rate": 1e-2} | settings
    return PolicyGradient(
        task, BaselineSettings(**settings), surrogate=surrogate, generator=seeded(seed)
    )


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def kernel_at(model, path, k):
    level = torch.full((path.x.shape[1],), k)
    return DIFFUSION.kernel(model(path.x[k], level, None), path.x[k], level), level


def expected_gradient(surrogate, model: nn.Module, advantage) -> Tensor:
    """E of the gradient of the summed loss over the model's own paths, by quadrature."""
    path, weight = quadrature(model)
    value = advantage(path)
    model.zero_grad()
    for k in range(1, LEVELS + 1):
        kernel, level = kernel_at(model, path, k)
        log_prob = kernel.log_prob(path.x[k - 1])
        reference = kernel_at(PRIOR, path, k)[0]
        steps = Steps(kernel, log_prob, log_prob.detach(), value, level, 1, lambda r=reference: r)
        (weight * surrogate.loss(steps)).sum().backward()
    return gradients(model)


def differentiable_moments(model: FreeSteps) -> tuple[Tensor, Tensor]:
    """Mean and variance of x[0], with graph."""
    level = torch.arange(1, LEVELS + 1)
    zero = torch.zeros(LEVELS, 1).double()
    at_zero = DIFFUSION.kernel(model(zero, level, None), zero, level)
    at_one = DIFFUSION.kernel(model(zero + 1, level, None), zero + 1, level)
    return Chain(at_one.mean - at_zero.mean, at_zero.mean, at_zero.std).final(ZERO, ONE)


def reward_of(reward: Quadratic):
    return lambda path: reward(path.x0)


@pytest.mark.parametrize("reward", [LINEAR, CONCAVE])
@pytest.mark.parametrize("surrogate", [Ddpo(), ClippedDdpo()])
def test_the_expected_gradient_of_ddpo_is_that_of_the_expected_advantage(surrogate, reward):
    model = FreeSteps(tilted(CONCAVE), scaled=True)
    found = expected_gradient(surrogate, model, reward_of(reward))
    model.zero_grad()
    mean, variance = differentiable_moments(model)
    p, q = reward.curvature, reward.slope
    (p * (mean.square() + variance) / 2 - q * mean).sum().backward()
    torch.testing.assert_close(found, gradients(model), rtol=1e-9, atol=1e-10)
    assert found.abs().max() > 0.1


def myopic(reward: Quadratic) -> Chain:
    """Each step is the prior's tilted by exp E_post[log r | x[k-1]]: where DPOK ought to end."""
    value, steps = reward, []
    for slope, shift, std in zip(PRIOR_CHAIN.slope, PRIOR_CHAIN.shift, PRIOR_CHAIN.std):
        p, q, d = value.curvature, value.slope, 1 + value.curvature * std**2
        a, b, s = slope / d, (shift + q * std**2) / d, std / d.sqrt()
        steps.append((a, b, s))
        offset = value.offset + q * b - p * (b**2 + s**2) / 2
        value = Quadratic(p * a**2, a * (q - p * b), offset)
    return Chain(*(torch.stack(column) for column in zip(*steps)))


def largest(surrogate, chain: Chain, reward: Quadratic) -> float:
    """Largest coordinate of the expected gradient at a chain."""
    model = FreeSteps(chain, scaled=True)
    mean = float((quadrature(model)[1] * reward(quadrature(model)[0].x0)).sum())
    return float(expected_gradient(surrogate, model, lambda p: reward(p.x0) - mean).abs().max())


def test_dpok_is_stationary_at_the_posterior_of_a_linear_reward():
    assert largest(Dpok(), tilted(LINEAR), LINEAR) < 1e-10
    assert largest(Dpok(), PRIOR_CHAIN, LINEAR) > 0.1


def test_dpok_ends_beside_the_posterior_of_a_concave_reward():
    """At steps that ignore the KL to come: 8 % of the way short, 3 % too wide."""
    assert largest(Dpok(), myopic(CONCAVE), CONCAVE) < 1e-10
    assert largest(Dpok(), tilted(CONCAVE), CONCAVE) > 0.1
    mean, variance = map(float, myopic(CONCAVE).final(ZERO, ONE))
    exact, exact_variance = map(float, tilted(CONCAVE).final(ZERO, ONE))
    assert (mean - 1) / (exact - 1) == pytest.approx(0.922, abs=1e-3)
    assert variance / exact_variance == pytest.approx(1.034, abs=1e-3)


def test_published_dpok_is_stationary_at_neither():
    published = published_dpok(DIFFUSION)
    assert largest(published, tilted(LINEAR), LINEAR) > 1
    assert largest(published, tilted(CONCAVE), CONCAVE) > 1
    assert largest(published, myopic(CONCAVE), CONCAVE) > 1


def reinforce_gradient(chain: Chain) -> Tensor:
    """Expected gradient of `kl_regularised_reinforce`, without baseline, at a chain."""
    model = FreeSteps(chain, scaled=True)
    path, weight = quadrature(model)
    ratio = log_ratio(DIFFUSION, model, PRIOR, path).detach()
    backward_in_chunks(DIFFUSION, model, path, -weight * (CONCAVE(path.x0) - ratio))
    return gradients(model)


def test_kl_regularised_reinforce_is_stationary_at_the_posterior_alone():
    assert reinforce_gradient(tilted(CONCAVE)).abs().max() < 1e-10
    assert reinforce_gradient(myopic(CONCAVE)).abs().max() > 0.1
    ratio = torch.randn(8, generator=seeded(0), requires_grad=True)
    log_reward = torch.randn(8, generator=seeded(1))
    kl_regularised_reinforce(8)(torch.zeros(8), ratio, log_reward, 2.0).backward()
    weight = 2 * log_reward - ratio.detach()
    torch.testing.assert_close(ratio.grad, -leave_one_out(weight[None])[0] / 8)


def trained(trainer, updates: int) -> tuple[float, float]:
    """Mean and variance of x[0] after training."""
    for step in range(updates):
        trainer.update(step)
    return moments(trainer.average.module)


def training(updates: int) -> dict[str, float]:
    return {"updates": updates, "last_learning_rate": 0.02, "average_decay": 0.98}


def test_dpok_trains_to_its_own_optimum_and_not_to_the_posterior():
    trainer = make_trainer(make_task(CONCAVE, scaled=True), Dpok(), paths=1024, **training(200))
    mean, variance = trained(trainer, 200)
    assert mean == pytest.approx(1.3161, abs=0.006)
    assert variance == pytest.approx(0.1477, abs=0.005)
    assert abs(mean - 1.3429) > 0.02


def test_the_unbiased_gradient_trains_to_the_posterior():
    settings = FinetuneSettings(
        beta_warmup=1,
        conditions=1,
        mix=Mix(on_policy=128, data=0),
        learning_rate=2e-2,
        levels_per_path=None,
        **training(200),
    )
    objective, log_z = kl_regularised_reinforce(128), ScalarLogZ().double()
    task = make_task(CONCAVE, scaled=True)
    trainer = Finetuner(task, log_z, settings, generator=seeded(0), objective=objective)
    assert trained(trainer, 200) == pytest.approx((1.34286, 0.142857), abs=1e-3)


@pytest.mark.parametrize(
    "surrogate", [Ddpo(), ClippedDdpo(clip_range=0.1, passes=2), published_dpok(DIFFUSION)]
)
def test_without_a_kl_that_counts_the_posterior_collapses_onto_the_best_point(surrogate):
    settings = {"paths": 128, "learning_rate": 5e-2} | training(150)
    trainer = make_trainer(make_task(CONCAVE, scaled=True), surrogate, **settings)
    mean, variance = trained(trainer, 150)
    assert mean == pytest.approx(1.8, abs=0.05)  # the posterior: N(1.343, 0.143)
    assert variance < 0.005


def score_gradient(trainer, path, advantage) -> Tensor:
    """Mean over paths of -advantage grad log p_post, by the core."""
    model = trainer.task.posterior
    model.zero_grad()
    backward_in_chunks(DIFFUSION, model, path, -advantage / len(advantage))
    return gradients(model)


@pytest.mark.parametrize("surrogate", [Ddpo(), ClippedDdpo(), Dpok(kl_weight=0.0)])
@pytest.mark.parametrize("chunk", [7, 4096])
def test_a_first_pass_adds_the_score_function_whatever_the_chunk(surrogate, chunk):
    trainer = make_trainer(make_task(LINEAR, scaled=True), surrogate, chunk=chunk)
    path = trainer.learner.draw()
    advantage = trainer.advantage(LINEAR(path.x0), None)
    expected = score_gradient(trainer, path, advantage)
    trainer.task.posterior.zero_grad()
    loss, log_probs = trainer.accumulate(path, advantage, trainer.learner.levels(64), None)
    found = gradients(trainer.task.posterior)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    log_prob = torch.cat(log_probs).reshape(LEVELS, 64).sum(0)
    by_hand = {ClippedDdpo: -LEVELS * advantage}.get(type(surrogate), -advantage * log_prob)
    torch.testing.assert_close(loss, by_hand.mean())


def test_subsets_of_the_levels_average_to_the_whole_gradient():
    trainer = make_trainer(make_task(CONCAVE, scaled=True), Dpok())
    path = trainer.learner.draw()
    advantage = trainer.advantage(CONCAVE(path.x0), None)

    def gradient(levels):
        trainer.task.posterior.zero_grad()
        trainer.accumulate(path, advantage, levels, None)
        return gradients(trainer.task.posterior)

    pairs = torch.tensor([[1, 2], [1, 3], [2, 3]])
    subsets = [gradient(pair[:, None].expand(-1, 64)) for pair in pairs]
    whole = gradient(trainer.learner.levels(64))
    torch.testing.assert_close(torch.stack(subsets).mean(0), whole, rtol=1e-9, atol=1e-12)


def made_up(log_prob: Tensor, advantage: Tensor, dimension: int) -> Steps:
    """Steps whose log-density was zero in the first pass."""
    zero = torch.zeros_like(advantage)
    kernel = GaussianKernel(zero, zero + 1)
    return Steps(kernel, log_prob, zero, advantage, zero, dimension, lambda: kernel)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "moves"),
    [(1, 0.3, False), (1, -0.3, True), (-1, -0.3, False), (-1, 0.3, True), (1, 0.1, True)],
)
def test_the_clip_stops_what_has_gone_far_enough_and_nothing_else(advantage, log_ratio, moves):
    """Bounds (1 -+ 0.02)^10, about exp(-+0.2); unclipped gradient -A w."""
    log_prob = torch.full((1,), log_ratio, dtype=torch.float64, requires_grad=True)
    signed = torch.full((1,), float(advantage)).double()
    ClippedDdpo(clip_range=0.02).loss(made_up(log_prob, signed, 10)).sum().backward()
    expected = -advantage * float(log_prob.detach().exp()) if moves else 0.0
    assert float(log_prob.grad) == pytest.approx(expected, rel=1e-12)


def test_the_clip_of_the_sum_is_the_published_clip_of_the_mean():
    """Over 16,384 coordinates ratios of 0.19 to 5.1 pass: w^(1/d) is within 1 -+ 1e-4."""
    log_ratio = torch.linspace(-3, 3, 301).double()
    dimension, clip = 16_384, 1e-4
    for sign in (-1.0, 1.0):
        log_prob = log_ratio.clone().requires_grad_()
        zero = torch.zeros_like(log_ratio)
        steps = made_up(log_prob, zero + sign, dimension)
        ClippedDdpo(clip_range=clip).loss(steps).sum().backward()
        mean_ratio = (log_ratio / dimension).exp()
        stopped = mean_ratio > 1 + clip if sign > 0 else mean_ratio < 1 - clip
        assert torch.equal(log_prob.grad == 0, stopped) and 50 < int(stopped.sum()) < 100


def test_kl_of_gaussian_steps_is_that_of_the_normal_laws():
    mean, other, scale, wide = torch.randn((4, 6, 3), generator=seeded(0), dtype=torch.float64)
    kernel, reference = GaussianKernel(mean, scale.exp()), GaussianKernel(other, wide.exp())
    exact = kl_divergence(Normal(mean, scale.exp()), Normal(other, wide.exp())).sum(1)
    level = torch.ones(6)
    torch.testing.assert_close(gaussian_kl(kernel, reference, level), exact)
    assert torch.equal(gaussian_kl(kernel, kernel, level), torch.zeros(6).double())


def test_noise_difference_is_that_of_the_predicted_noises():
    x0, other, x = torch.randn((3, 6, 1), generator=seeded(0), dtype=torch.float64)
    level = torch.tensor([1, 2, 3, 1, 2, 3])
    signal, noise = SCHEDULE.signal[level, None], (1 - SCHEDULE.signal[level, None] ** 2).sqrt()
    exact = ((x - signal * x0) / noise - (x - signal * other) / noise).square().sum(1)
    kernels = (DIFFUSION.kernel(point, x, level) for point in (x0, other))
    found = noise_difference(DIFFUSION)(*kernels, level)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def test_rewards_are_standardised_within_their_condition():
    shape = torch.tensor([-1.0, 0.0, 3.0, -2.0])
    reward = torch.stack([1e-4 * shape + 5e-4, shape - 7, 1e5 * shape + 1e7, 0 * shape + 0.1])
    expected = (shape / shape.std(correction=0)).expand(3, 4)
    found = standardised(reward, 5.0)
    torch.testing.assert_close(found[:3], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[3], torch.zeros(4))
    outlier = torch.zeros(1, 100)
    outlier[0, 7] = -1e6
    assert float(standardised(outlier, 5.0).min()) == -5.0
    others = (reward.sum(1, keepdim=True) - reward) / 3
    torch.testing.assert_close(leave_one_out(reward), reward - others, rtol=1e-4, atol=1e-4)


class OfCondition(nn.Module):
    """Free steps that don't look at the condition."""

    def __init__(self):
        super().__init__()
        self.steps = FreeSteps(PRIOR_CHAIN, scaled=False)

    def forward(self, x, level, condition):
        assert condition.shape == (len(x), 1)
        return self.steps(x, level, None)


def conditional_task() -> Task:
    """Rewards of very different scale: log r = 10^c x[0] for c = 0, 1, ..."""

    def draw(n, *, generator):
        return torch.arange(float(n))[:, None], None

    def log_reward(x0, condition):
        return (10 ** condition.double() * x0).sum(1)

    return Task("scales", DIFFUSION, PRIOR, OfCondition(), log_reward, draw)


def test_conditions_of_any_reward_scale_count_the_same():
    trainer = make_trainer(conditional_task(), Ddpo(), conditions=4, paths=8)
    path = trainer.learner.draw()
    reward = trainer.task.log_reward(path.x0, path.condition)
    groups = trainer.advantage(reward, path.condition).reshape(4, 8)
    points = path.x0.reshape(4, 8)
    centred = points - points.mean(1, keepdim=True)
    expected = centred / points.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(groups, expected)
    trainer.update(0)
    free = make_trainer(make_task(LINEAR, scaled=True), Ddpo(), conditions=4, paths=8)
    path = free.learner.draw()
    batch = free.advantage(LINEAR(path.x0), None)
    assert float(batch.mean()) == pytest.approx(0, abs=1e-12)
    assert float(batch.std(correction=0)) == pytest.approx(1)


def test_only_parameters_that_ask_for_a_gradient_move_and_calls_are_counted():
    task = make_task(CONCAVE, scaled=True)
    task.posterior.slope.requires_grad_(False)
    before = {name: value.clone() for name, value in task.posterior.state_dict().items()}
    trainer = make_trainer(task, Dpok(), paths=10, levels_per_path=2)
    metrics = trainer.update(0)
    after = task.posterior.state_dict()
    assert torch.equal(before["slope"], after["slope"])
    assert not torch.equal(before["shift"], after["shift"])
    forward, trained_rows, prior_rows = 10 * LEVELS, 10 * 2 * 3, 10 * 2
    assert trainer.calls == metrics["policy/calls"] == forward + trained_rows + prior_rows
    clipped = make_trainer(make_task(CONCAVE, scaled=True), ClippedDdpo(passes=3), paths=10)
    clipped.update(0)
    assert clipped.calls == forward + 3 * 3 * 10 * LEVELS


def test_beta_scales_the_reward_of_dpok_and_not_that_of_ddpo():
    moved = {}
    for surrogate in (Ddpo(), Dpok()):
        for beta in (1.0, 4.0):
            task = make_task(LINEAR, scaled=False)
            make_trainer(task, surrogate, beta=beta, gradient_clip=1e9).update(0)
            moved[type(surrogate), beta] = gradients(task.posterior)
    torch.testing.assert_close(moved[Ddpo, 1.0], moved[Ddpo, 4.0])
    torch.testing.assert_close(moved[Dpok, 4.0], 4 * moved[Dpok, 1.0])  # no KL at the prior yet


@pytest.mark.parametrize(
    "surrogate", [Ddpo(), ClippedDdpo(passes=2), Dpok(), published_dpok(DIFFUSION)]
)
def test_resumed_training_is_bit_equal(tmp_path, surrogate):
    def fit(directory, stop_at=None):
        settings = {"paths": 16, "levels_per_path": 2, "updates": 12, "last_learning_rate": 0.1}
        trainer = make_trainer(make_task(CONCAVE, scaled=True), surrogate, **settings)

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


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"paths": 0}, "paths is 0; give 1 or more"),
        ({"levels_per_path": 4}, "levels_per_path is 4 for a diffusion of 3 levels"),
        ({"levels_per_path": 0}, "levels_per_path is 0; give 1 or more"),
    ],
)
def test_settings_that_draw_nothing_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        make_trainer(make_task(LINEAR, scaled=False), Ddpo(), **settings)


def test_a_group_of_one_a_frozen_posterior_and_missing_conditions_are_refused():
    with pytest.raises(InputError, match="4 paths for 4 conditions .* set paths to 2 or more"):
        make_trainer(conditional_task(), Ddpo(), conditions=4, paths=1).update(0)
    task = make_task(LINEAR, scaled=False)
    task.posterior.requires_grad_(False)
    with pytest.raises(InputError, match="has no parameter to train"):
        make_trainer(task, Ddpo())
    two = dataclasses.replace(
        conditional_task(), draw_conditions=lambda n, *, generator: (torch.zeros(2, 1), None)
    )
    with pytest.raises(InputError, match="returned 2 conditions where 4 were asked for"):
        make_trainer(two, Ddpo(), conditions=4).update(0)


def test_nan_stops_before_the_parameters_move():
    task = dataclasses.replace(
        make_task(LINEAR, scaled=False), log_reward=lambda x0, c: 1e300 * x0.sum(1)
    )
    before = task.posterior.shift.clone()
    with pytest.raises(NonFiniteError, match="step 0"):
        make_trainer(task, Dpok(), beta=1e10).update(0)
    assert torch.equal(task.posterior.shift, before)


class TokenTable(nn.Module):
    """Log-probabilities of three tokens and a mask, the same everywhere."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3))

    def forward(self, x, level, condition):
        log_probs = self.logits.log_softmax(0)
        padded = torch.cat([log_probs, log_probs.new_full((1,), -torch.inf)])
        return padded.expand(*x.shape, 4)


def token_task() -> Task:
    """Four tokens; log r counts the last one."""
    diffusion = MaskedDiffusion(4, 3, IndependentReveals(linear_masking(2), 4))
    return Task(
        "tokens", diffusion, TokenTable(), TokenTable(), lambda x0, c: (x0 == 2).float().sum(1)
    )


def test_ddpo_trains_tokens_and_dpok_says_that_it_has_no_kl_for_them():
    task = token_task()
    trainer = make_trainer(task, Ddpo(), learning_rate=0.1)
    for step in range(30):
        trainer.update(step)
    assert float(task.posterior.logits.detach().softmax(0)[2]) > 0.9
    with pytest.raises(InputError, match="needs Gaussian steps, not UnmaskingKernel"):
        make_trainer(token_task(), Dpok()).update(0)
