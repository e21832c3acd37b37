"""Guidance: gradients by hand, the law of a guided Gaussian chain, and what draws depend on."""

import math

import pytest
import torch
from torch import Generator, Tensor

from rtb_rl.baselines.draws import CountedDenoiser, Draws, tempered
from rtb_rl.baselines.guidance import (
    dps,
    lgd_mc,
    look_ahead,
    noised_logits_guidance,
    point_likelihood,
    smoothed_likelihood,
)
from rtb_rl.baselines.guidance_steps import (
    Guidance,
    likelihood_step,
    normalised_step,
    posterior_mean_step,
)
from rtb_rl.baselines.selection import best_of_n, importance_resampling
from rtb_rl.baselines.steering import fk_steering, twisted_smc
from rtb_rl.core import (
    GaussianDiffusion,
    GaussianKernel,
    Sampler,
    ScaledPrediction,
    cosine_schedule,
    zero_terminal_signal,
)
from rtb_rl.errors import InputError, NonFiniteError
from rtb_rl.tasks.toy import (
    Chain,
    GaussianDenoiser,
    chain_of,
    exact_spread,
    linear_reward,
    squared_reward,
    tilt,
)

MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
VARIANCE = torch.tensor([0.25, 0.6], dtype=torch.float64)
ZERO, ONE = torch.zeros_like(MEAN), torch.ones_like(MEAN)


def gaussian(levels: int) -> tuple[GaussianDiffusion, GaussianDenoiser]:
    """A chain with the law of the data N(MEAN, VARIANCE) at any number of levels."""
    schedule = zero_terminal_signal(cosine_schedule(levels))
    spread = exact_spread(schedule, VARIANCE)
    diffusion = GaussianDiffusion(schedule, (2,), spread, dtype=torch.float64)
    return diffusion, GaussianDenoiser(schedule, MEAN, VARIANCE)


CHAIN, PRIOR = gaussian(12)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def noisy(batch: int, level: int) -> tuple[Tensor, Tensor]:
    x = torch.randn((batch, 2), generator=seeded(5), dtype=torch.float64)
    return x, torch.full((batch,), level)


def near(x0, condition) -> Tensor:
    """A Gaussian likelihood of the condition, standard deviation 0.3, maximum 1."""
    return -(condition - x0).square().sum(1) / (2 * 0.3**2)


def nonlinear(x: Tensor, level: Tensor, condition) -> Tensor:
    """A denoiser that mixes coordinates."""
    return torch.stack([(x[:, 0] * x[:, 1]).sin(), x.sum(1).tanh()], 1)


# --- single steps


def test_the_gradient_is_that_of_the_likelihood_of_the_prediction():
    x, level = noisy(6, 5)
    y = torch.ones_like(x)
    found = look_ahead(nonlinear, point_likelihood(near, 2.0), x, level, y)
    torch.testing.assert_close(found.log_likelihood, 2 * near(nonlinear(x, level, y), y))
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(
            lambda v: nonlinear(v[None], level[:1], None)[0], x[i]
        )
        assert isinstance(jacobian, Tensor)
        slope = 2 * (1 - nonlinear(x[i : i + 1], level[:1], None)[0]) / 0.3**2
        torch.testing.assert_close(found.gradient[i], slope @ jacobian)


def test_each_step_rule_scales_the_gradient_its_own_way():
    x, level = noisy(6, 5)
    y = torch.ones_like(x)
    found = look_ahead(nonlinear, point_likelihood(near, 1.0), x, level, y)
    kernel = GaussianKernel(x, torch.tensor([0.5, 2.0], dtype=torch.float64))
    assert torch.equal(likelihood_step(0.7)(found, kernel), 0.7 * found.gradient)
    scaled = found.gradient * torch.tensor([0.25, 4.0], dtype=torch.float64)
    torch.testing.assert_close(posterior_mean_step(found, kernel), scaled)
    leaf = x.clone().requires_grad_()
    norms = (y - nonlinear(leaf, level, None)).norm(dim=1)
    (gradient,) = torch.autograd.grad(norms.sum(), leaf)
    torch.testing.assert_close(normalised_step(0.7)(found, kernel), -0.7 / 0.3 * gradient)


def test_a_residual_norm_needs_a_likelihood_below_one():
    x = torch.zeros(2, 2)
    guidance = Guidance(x, torch.tensor([-1.0, 0.5]), x)
    with pytest.raises(InputError, match=r"log r reaches 0\.5 and its maximum is .* 0;"):
        normalised_step(1.0)(guidance, GaussianKernel(x, torch.ones(2)))
    at_the_top = Guidance(x, torch.zeros(2), x)
    assert torch.equal(normalised_step(1.0)(at_the_top, GaussianKernel(x, torch.ones(2))), x)


def test_a_smoothed_gradient_weighs_its_particles_by_their_likelihood():
    particles, (x, level) = 7, noisy(5, 3)
    y = torch.ones_like(x)
    likelihood = smoothed_likelihood(CHAIN, near, 0.8, particles, generator=seeded(1))
    found = look_ahead(PRIOR, likelihood, x, level, y)
    noise = torch.randn((5, particles, 2), generator=seeded(1), dtype=torch.float64)
    width = (1 - CHAIN.signal[3].square()).sqrt()
    around = PRIOR(x, level, None)[:, None] + width * noise
    log_r = -0.8 * (1 - around).square().sum(2) / (2 * 0.3**2)
    slopes = 0.8 * (1 - around) / 0.3**2
    weighed = (log_r.softmax(1)[..., None] * slopes).sum(1)
    torch.testing.assert_close(found.gradient, weighed * PRIOR.gain[3])
    torch.testing.assert_close(found.log_likelihood, log_r.logsumexp(1) - math.log(particles))
    plain_average = slopes.mean(1) * PRIOR.gain[3]
    assert bool(((found.gradient - plain_average).abs() > 0.1).any())


def test_many_particles_widen_a_gaussian_likelihood():
    """E exp(-(y - x0 - w eps)^2 / 2 s^2) is Gaussian in x0, of variance s^2 + w^2."""
    x, level = noisy(3, 2)
    y = PRIOR(x, level, None) + 0.4
    likelihood = smoothed_likelihood(CHAIN, near, 1.0, 100_000, generator=seeded(2))
    found = look_ahead(PRIOR, likelihood, x, level, y)
    variance = 0.3**2 + float(CHAIN.noise[2].square())
    exact = 0.4 / variance * PRIOR.gain[2]
    torch.testing.assert_close(found.gradient, exact.expand(3, 2), rtol=0.03, atol=0)


# --- whole chains


def guided(chain: Chain, denoiser: GaussianDenoiser, slope: Tensor) -> Chain:
    """The chain whose steps are shifted by std^2 times the gradient of slope . predicted x0."""
    return Chain(chain.slope, chain.shift + chain.std**2 * slope * denoiser.gain[1:], chain.std)


def test_a_linear_reward_is_followed_exactly_as_steps_become_small():
    """The guided chain is affine, so its end is closed; the exact one tilts a step by the gain of
    the level it goes to, guidance by that of the level it leaves.
    """
    slope = torch.tensor([1.2, -0.8], dtype=torch.float64)
    errors = []
    for levels in (25, 100, 400):
        diffusion, prior = gaussian(levels)
        chain = chain_of(diffusion, prior)
        tilted, value = tilt(chain, linear_reward(slope))
        exact, exact_variance = tilted.final(*value.tilted_start())
        mean, variance = guided(chain, prior, slope).final(ZERO, ONE)
        torch.testing.assert_close(exact, MEAN + VARIANCE * slope)
        torch.testing.assert_close(variance, exact_variance)
        errors.append(float((mean - exact).abs().max()))
    assert errors[2] < errors[1] / 2 < errors[0] / 4
    assert errors[2] < 0.02


def test_draws_have_the_law_of_the_guided_chain():
    slope = torch.tensor([1.2, -0.8], dtype=torch.float64)
    reward = linear_reward(slope)
    mean, variance = guided(chain_of(CHAIN, PRIOR), PRIOR, slope).final(ZERO, ONE)
    assert float((mean - MEAN).abs().min()) > 0.2
    for method in (dps, lgd_mc):  # a linear log r has one slope everywhere
        draws = method(
            CHAIN,
            PRIOR,
            lambda x0, condition: 2 * reward(x0),
            None,
            20_000,
            beta=0.5,
            generator=seeded(),
        )
        assert draws.x0.shape == (20_000, 2)
        torch.testing.assert_close(draws.x0.mean(0), mean, rtol=0, atol=0.02)
        torch.testing.assert_close(draws.x0.var(0), variance, rtol=0.04, atol=0)


def test_a_concave_reward_is_followed_too_far():
    """Guidance by the predicted x0 leaves out the spread of x0: the mean overshoots towards the
    goal and the variance is too small. `lgd_mc` allows for a spread and comes near.
    """
    diffusion, prior = gaussian(100)
    reward = squared_reward(ONE * 6, MEAN + 1)
    tilted, value = tilt(chain_of(diffusion, prior), reward)
    mean, variance = tilted.final(*value.tilted_start())

    def beyond(method) -> tuple[Tensor, Tensor]:
        draws = method(
            diffusion, prior, lambda x0, condition: reward(x0), None, 4000, generator=seeded()
        )
        return draws.x0.mean(0) - mean, draws.x0.var(0) / variance

    overshoot, narrowness = beyond(dps)
    assert bool((overshoot > 0.12).all()) and bool((narrowness < 0.9).all())
    shift, ratio = beyond(lgd_mc)
    assert bool((shift.abs() < 0.06).all()) and bool(((ratio - 1).abs() < 0.12).all())


def three_rows(method, others: float, **settings) -> Tensor:
    rows = torch.tensor([[0.3, 0.1], [1.0, 1.0], [-1.0, 2.0]], dtype=torch.float64)
    rows[1:] *= others
    return method(CHAIN, PRIOR, near, rows, 2, generator=seeded(), **settings).x0


@pytest.mark.parametrize("step", [likelihood_step(0.1), normalised_step(0.3), posterior_mean_step])
@pytest.mark.parametrize("method", [dps, lgd_mc])
def test_a_row_does_not_depend_on_the_others(method, step):
    first, second = (three_rows(method, others, step=step) for others in (1.0, 4.0))
    assert first.shape == (3, 2, 2)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def as_logits(x0, condition) -> Tensor:
    return torch.cat([x0, condition - x0], 1)


def published(diffusion: GaussianDiffusion, denoiser, rows: Tensor, n: int) -> Draws:
    return noised_logits_guidance(
        diffusion, denoiser, as_logits, rows, n, classes=(1, 2), strength=2.0, generator=seeded()
    )


def half(x, level, condition) -> Tensor:
    return x / 2


SHORT = GaussianDiffusion(cosine_schedule(2), (2,), ONE, dtype=torch.float64)
ROWS = torch.tensor([[0.3, 0.1], [1.0, 1.0]], dtype=torch.float64)


def test_the_published_guidance_mixes_the_rows_of_a_batch():
    first = published(CHAIN, PRIOR, ROWS, 3)
    second = published(CHAIN, PRIOR, ROWS * torch.tensor([[1.0], [4.0]]), 3)
    assert first.calls == 3 * CHAIN.levels
    assert not torch.allclose(first.x0[0], second.x0[0])


def test_the_published_guidance_by_hand():
    """Target and logits are noised by one draw, whichever it is; the norm is of all rows."""
    generator = seeded()
    x = SHORT.start(3, generator=generator)
    for k in (2, 1):
        leaf, level = x.clone().requires_grad_(), torch.full((3,), k)
        target = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
        eps = torch.randn(4, generator=seeded(9), dtype=torch.float64)
        logits = as_logits(leaf / 2, ROWS[:1].expand(3, 2))
        noised = [SHORT.signal[k] * v + SHORT.noise[k] * eps for v in (target, logits)]
        (gradient,) = torch.autograd.grad((noised[0] - noised[1]).norm(), leaf)
        x = SHORT.kernel(x / 2, x, level).sample(generator=generator) - 2.0 * gradient
    torch.testing.assert_close(published(SHORT, half, ROWS[:1], 3).x0[0], x)


def test_the_published_guidance_weakens_as_the_batch_grows():
    """By its root, where all rows are alike: here logits are far from the target by much more than
    draws differ. `dps` keeps its strength.
    """
    far = torch.full((1, 2), 1e3, dtype=torch.float64)

    def shift(n: int) -> Tensor:
        plain = Sampler(SHORT, half).sample(far, n, generator=seeded())
        return (published(SHORT, half, far, n).x0 - plain).mean((0, 1))

    torch.testing.assert_close(shift(64), shift(4) / 4, rtol=0.02, atol=0)


# --- cost and errors


def test_calls_are_three_a_level_however_many_particles():
    for draws in (
        dps(CHAIN, PRIOR, near, ONE[None], 5, generator=seeded()),
        lgd_mc(CHAIN, PRIOR, near, ONE[None], 5, particles=4, generator=seeded()),
    ):
        assert draws.calls == 3 * CHAIN.levels
        assert draws.log_z is None


def test_a_counted_denoiser_counts_rows_and_backward_passes():
    def scaled(x, level, condition):
        return ScaledPrediction(2 * x, x)

    for denoiser in (nonlinear, scaled):
        counted, (x, level) = CountedDenoiser(denoiser), noisy(5, 1)
        counted(x, level, None)
        assert counted.calls == 5
        x.requires_grad_()
        with torch.no_grad():
            counted(x, level, None)
        assert counted.calls == 10
        prediction = counted(x, level, None)
        assert counted.calls == 15
        (prediction if isinstance(prediction, Tensor) else prediction.x0).sum().backward()
        assert counted.calls == 25


def test_a_reward_without_gradient_is_refused():
    with pytest.raises(InputError, match="passes no gradient"):
        dps(CHAIN, PRIOR, lambda x0, condition: x0.detach().sum(1), None, 2, generator=seeded())


def test_a_reward_is_checked():
    x0 = torch.zeros(3, 1)
    with pytest.raises(InputError, match=r"returned \(3, 1\) for 3 points"):
        tempered(lambda x0, condition: x0, 1.0)(x0, None)
    with pytest.raises(NonFiniteError, match="at 3 of 3 points"):
        tempered(lambda x0, condition: x0[:, 0] + math.nan, 1.0)(x0, None)
    with pytest.raises(InputError, match="returned list for 3 points"):
        tempered(lambda x0, condition: [0.0] * 3, 1.0)(x0, None)
    floored = tempered(lambda x0, condition: x0[:, 0] - math.inf, 2.0)(x0, None)
    assert floored.tolist() == [-2e6] * 3
    half = tempered(lambda x0, condition: x0[:, 0].half() - 1, 2.0)(x0, None)
    assert half.dtype == torch.float32 and half.tolist() == [-2.0] * 3


METHODS = (best_of_n, importance_resampling, fk_steering, twisted_smc, dps, lgd_mc)


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        *((m, {"beta": math.nan}, "beta is nan; give a finite number") for m in METHODS),
        (best_of_n, {"candidates": 0}, "candidates is 0; give 1 or more"),
        (importance_resampling, {"candidates": 0}, "candidates is 0; give 1 or more"),
        (lgd_mc, {"particles": 0}, "particles is 0; give 1 or more"),
        (fk_steering, {"particles": 0}, "particles is 0; give 1 or more"),
        (twisted_smc, {"particles": -4}, "particles is -4; give 1 or more"),
        (fk_steering, {"ess_threshold": 50.0}, "ess_threshold is 50.0; give a share from 0 to 1"),
        (fk_steering, {"ess_threshold": math.nan}, "ess_threshold is nan; give a share"),
        (fk_steering, {"levels": [99]}, "there is no level 99 in a diffusion of"),
    ],
)
def test_settings_without_a_meaning_are_refused(method, given, words):
    """Some returned draws with a log Z of NaN, some ended deep inside."""
    with pytest.raises(InputError, match=words):
        method(CHAIN, PRIOR, lambda x0, condition: x0.sum(1), None, 4, **given, generator=seeded())
