"""Gaussian mixtures against torch's densities, Tweedie's formula and Bayes' rule."""

import math

import pytest
import torch
from torch import Generator, Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from rtb_rl.core import Sampler, ScorePrediction, log_snr_schedule, vp_schedule
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.tasks.toy import (
    GaussianMixture,
    mixture_chain,
    mode_errors,
    random_mixture,
    random_observation,
    random_tilt,
    twenty_five,
    weight_error,
)

SIZE = 3
DATA = random_mixture(SIZE, 4, generator=Generator().manual_seed(0))
OPERATOR = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0]], dtype=torch.float64)
NOISE = torch.tensor([[0.5, 0.1], [0.1, 0.3]], dtype=torch.float64)


def law(mixture: GaussianMixture, signal: float = 1.0) -> MixtureSameFamily:
    """The law of signal x_0 + sqrt(1 - signal^2) eps."""
    noise = (1 - signal**2) * torch.eye(mixture.size, dtype=torch.float64)
    return MixtureSameFamily(
        Categorical(probs=mixture.weights),
        MultivariateNormal(signal * mixture.means, signal**2 * mixture.covariances + noise),
    )


def points(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def test_log_prob_is_the_density_of_the_mixture():
    x = 2 * points(50, SIZE)
    torch.testing.assert_close(DATA.log_prob(x), law(DATA).log_prob(x))
    torch.testing.assert_close(DATA.log_responsibilities(x).exp().sum(1), torch.ones(50).double())


def test_draws_have_the_moments_of_the_mixture():
    n = 50_000
    x = DATA.sample(n, generator=Generator().manual_seed(1))
    error = x - law(DATA).mean
    assert (error.mean(0).abs() < 4 * (law(DATA).variance / n).sqrt()).all()
    between = DATA.means - law(DATA).mean
    covariance = (
        DATA.weights[:, None, None] * (DATA.covariances + between[..., None] * between[:, None])
    ).sum(0)
    products = error[..., None] * error[:, None]
    assert ((products.mean(0) - covariance).abs() < 4.5 * products.std(0) / math.sqrt(n)).all()


def test_draws_of_a_batch_are_those_of_each_row():
    posterior, _ = DATA.tilted(points(5, SIZE))
    x = posterior.sample(20_000, generator=Generator().manual_seed(1))
    assert x.shape == (5, 20_000, SIZE)
    mean = (posterior.weights[..., None] * posterior.means).sum(1)
    assert ((x.mean(1) - mean).abs() < 4.5 * x.std(1) / math.sqrt(20_000)).all()
    assert weight_error(x, posterior)["tv"] < 0.01


def test_the_denoiser_is_tweedie_s_formula_of_the_noised_density():
    schedule = vp_schedule(6)
    x, level = 2 * points(6, SIZE), torch.arange(1, 7)

    def score(x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        leaf = x.clone().requires_grad_()
        densities = [
            law(DATA, float(schedule.signal[k])).log_prob(leaf[i]) for i, k in enumerate(level)
        ]
        return torch.autograd.grad(torch.stack(densities).sum(), [leaf])[0]

    expected = ScorePrediction(score, schedule)(x, level, None)
    denoiser = DATA.denoiser(schedule)
    torch.testing.assert_close(denoiser(x, level, None), expected)
    single = denoiser(x.float(), level, None)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_denoiser_is_of_one_mixture():
    with pytest.raises(InputError, match="one mixture"):
        DATA.tilted(points(5, SIZE))[0].denoiser(vp_schedule(4))


def test_the_tilt_is_the_mixture_times_exp_over_the_normaliser():
    slopes, x = points(5, SIZE), points(5, 20, SIZE, seed=1)
    posterior, log_z = DATA.tilted(slopes)
    expected = DATA.log_prob(x) + (x @ slopes[..., None]).squeeze(-1) - log_z[:, None]
    torch.testing.assert_close(posterior.log_prob(x), expected)
    one, log_z_of_one = DATA.tilted(slopes[3])
    torch.testing.assert_close(one.log_prob(x[3]), expected[3])
    assert log_z_of_one.shape == ()


def test_the_observed_mixture_is_bayes_rule():
    y, x = points(5, 2), points(5, 20, SIZE, seed=1)
    posterior, log_z = DATA.observed(OPERATOR, NOISE, y)
    likelihood = MultivariateNormal(x @ OPERATOR.mT, NOISE).log_prob(y[:, None])
    expected = DATA.log_prob(x) + likelihood - log_z[:, None]
    torch.testing.assert_close(posterior.log_prob(x), expected)
    alone, _ = DATA.observed(OPERATOR, NOISE, y[2])
    torch.testing.assert_close(alone.log_prob(x[2]), expected[2])


def test_reweighting_keeps_the_modes():
    gain = torch.tensor([0.5, -torch.inf, 1.0, 0.0], dtype=torch.float64)
    posterior, log_z = DATA.reweighted(gain)
    torch.testing.assert_close(posterior.weights * log_z.exp(), DATA.weights * gain.exp())
    x = points(20, SIZE)
    log_r = (DATA.log_responsibilities(x) + gain).logsumexp(1)
    torch.testing.assert_close(posterior.log_prob(x), DATA.log_prob(x) + log_r - log_z)


def test_components_and_nearest_modes():
    assert DATA.nearest(DATA.means).tolist() == [0, 1, 2, 3]
    assert DATA.component(DATA.means).tolist() == [0, 1, 2, 3]
    wide = GaussianMixture(
        torch.tensor([0.5, 0.5]), torch.tensor([[0.0], [1.0]]), torch.tensor([[[0.01]], [[4.0]]])
    )
    x = torch.tensor([[-1.0], [0.05]])
    assert wide.nearest(x).tolist() == [0, 0]
    assert wide.component(x).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("weights", "covariance", "message"),
    [
        (torch.tensor([0.5, 0.6]), torch.eye(2), "sum to 1"),
        (torch.tensor([0.5, 0.3, 0.2]), torch.eye(2), "need weights"),
        (torch.tensor([0.5, 0.5]), torch.diag(torch.tensor([1.0, 0.0])), "positive definite"),
    ],
)
def test_what_is_no_mixture_is_refused(weights: Tensor, covariance: Tensor, message: str):
    with pytest.raises(InputError, match=message):
        GaussianMixture(weights, torch.zeros(2, 2), covariance.expand(2, 2, 2))


@pytest.mark.parametrize("name", ["weights", "means", "covariances"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(name: str, bad: float):
    given = {
        "weights": torch.tensor([0.5, 0.5]),
        "means": torch.zeros(2, 2),
        "covariances": torch.eye(2).repeat(2, 1, 1),
    }
    given[name].view(-1)[0] = bad
    with pytest.raises(InputError, match=rf"{name} .* finite"):
        GaussianMixture(**given)


def test_a_covariance_of_two_halves_is_refused():
    """Densities and draws took one of them, tilts both."""
    halves = torch.tensor([[1.0, 0.9], [0.0, 1.0]]).expand(2, 2, 2)
    with pytest.raises(InputError, match="symmetric.* 0.9"):
        GaussianMixture(torch.tensor([0.5, 0.5]), torch.zeros(2, 2), halves)
    root = torch.randn((2, 5, 5), generator=Generator().manual_seed(0))
    rounded = root @ root.mT + torch.eye(5)
    rounded[:, 0, 1] *= 1 + 1e-6
    GaussianMixture(torch.tensor([0.5, 0.5]), torch.zeros(2, 5), rounded)


def test_soft_weights_are_unbiased_where_modes_overlap_and_hard_ones_are_not():
    overlapping = GaussianMixture(
        torch.tensor([0.8, 0.2]), torch.tensor([[0.0], [1.5]]), torch.ones(2, 1, 1)
    )
    x = overlapping.sample(50_000, generator=Generator().manual_seed(0))
    assert weight_error(x, overlapping)["tv"] < 0.005
    hard = (overlapping.component(x) == 1).double().mean()
    assert abs(float(hard) - 0.2) > 0.05


def test_the_weight_error_is_the_total_variation_per_row():
    mixture = twenty_five()
    rows = torch.stack([mixture.means[:2].repeat(5, 1), mixture.means[:1].repeat(10, 1)])
    posterior = GaussianMixture(
        torch.tensor([0.5, 0.5, *23 * [0.0]]).expand(2, 25),
        mixture.means.expand(2, 25, 2),
        mixture.covariances,
    )
    assert weight_error(rows, posterior)["tv"] == pytest.approx((0 + 0.5) / 2, abs=1e-6)


@pytest.mark.parametrize(("levels", "excess"), [(20, 0.35), (50, 0.12)])
def test_the_chain_of_a_mixture_is_nearly_the_mixture(levels: int, excess: float):
    """Its modes are a little too wide, less so with more levels; their weights are right."""
    mixture = twenty_five()
    generator = Generator().manual_seed(0)
    chain, prior = mixture_chain(mixture, levels, generator=generator)
    found = mode_errors(Sampler(chain, prior).sample(None, 8000, generator=generator), mixture)
    assert 0 < found["variance_ratio"] - 1 < excess
    assert found["tv"] < 0.06
    assert chain.signal_left == 0


@pytest.mark.parametrize(("size", "components"), [(2, 4), (8, 5), (32, 8)])
def test_random_problems_are_on_the_scale_of_one(size: int, components: int):
    generator = Generator().manual_seed(1)
    mixture = random_mixture(size, components, generator=generator)
    torch.testing.assert_close(law(mixture).mean, torch.zeros(size).double())
    torch.testing.assert_close(law(mixture).variance, torch.ones(size).double())
    x = mixture.sample(2000, generator=generator)
    assert mixture.log_responsibilities(x).amax(1).exp().mean() > 0.98
    posterior, log_z = mixture.tilted(random_tilt(mixture, generator=generator))
    moved = float((posterior.weights - mixture.weights).abs().sum() / 2)
    assert 0.35 <= moved < 0.5
    assert 0.1 < float(log_z) < 2
    operator, noise = random_observation(mixture, generator=generator)
    y = x @ operator.mT + points(2000, 2) @ noise.sqrt()
    seen, _ = mixture.observed(operator, noise, y)
    change = (seen.weights - mixture.weights).abs().sum(-1).mean() / 2
    assert 0.3 < float(change) < 0.6


def test_the_chain_resolves_the_narrowest_mode():
    narrow = GaussianMixture(
        torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), torch.full((2, 1, 1), 1e-4)
    )
    chain, _ = mixture_chain(narrow, 10, generator=Generator().manual_seed(0))
    assert float(chain.noise[1]) < 0.01 < float(log_snr_schedule(10).noise[1])


def test_the_variance_of_x0_given_x_is_tweedie_s_second_order_formula():
    """Var[x_0 | x] = (noise / signal)^2 (I + noise^2 hessian of log p_k(x)), on the diagonal."""
    schedule = vp_schedule(6)
    x, level = 2 * points(6, SIZE), torch.arange(1, 7)
    mean, variance, share = DATA.denoiser(schedule).moments(x, level)
    torch.testing.assert_close(mean, DATA.denoiser(schedule)(x, level, None))
    torch.testing.assert_close(share.sum(1), torch.ones(6).double())
    for row, k in enumerate(level):
        signal, noise = float(schedule.signal[k]), float(schedule.noise[k])
        hessian = torch.autograd.functional.hessian(law(DATA, signal).log_prob, x[row])
        assert isinstance(hessian, Tensor)
        expected = (noise / signal) ** 2 * (1 + noise**2 * hessian.diagonal())
        torch.testing.assert_close(variance[row], expected, rtol=1e-6, atol=1e-9)


def test_steps_have_the_exact_mean_and_spread_of_the_mixture_s_own():
    """x[k-1] given x[k], by weighting draws of (x[0], x[k-1]) with q(x[k] | x[k-1])."""
    diffusion, steps = mixture_chain(DATA, 8, generator=Generator().manual_seed(0))
    n, k = 400_000, 4
    before = diffusion.corrupt(
        DATA.sample(n, generator=Generator().manual_seed(1)),
        torch.full((n,), k - 1),
        generator=Generator().manual_seed(2),
    )
    x = diffusion.corrupt(DATA.means[:1], torch.tensor([k]), generator=Generator().manual_seed(3))
    error = (x - diffusion.ratio[k] * before) / diffusion.step_noise[k]
    weight = (-error.square().sum(1) / 2).softmax(0)[:, None]
    mean = (weight * before).sum(0)
    std = (weight * (before - mean).square()).sum(0).sqrt()
    kernel = diffusion.kernel(steps(x, torch.tensor([k]), None), x, torch.tensor([k]))
    size = float(1 / weight.square().sum()) ** 0.5
    assert ((kernel.mean[0] - mean).abs() < 4.5 * std / size).all()
    assert ((kernel.std[0] / std - 1).abs() < 4.5 / size).all()
