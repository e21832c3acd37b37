"""Smoothed images: densities, Tweedie's formula, Bayes' rule, and the call of a U-Net."""

import inspect
import math

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from rtb_rl.adapters.schedulers import scheduler_grid
from rtb_rl.adapters.unets import denoiser_from_unet
from rtb_rl.core import cosine_schedule
from rtb_rl.errors import InputError
from rtb_rl.tasks.image.images import load_images, to_model_space
from rtb_rl.tasks.image.rewards import ConditionalClassProbability
from rtb_rl.tasks.image.smoothed import (
    BayesClassifier,
    BayesReward,
    SmoothedDenoiser,
    SmoothedImages,
    SmoothedUNet,
    log_sum,
    shares,
)

LABELS = torch.tensor([0, 0, 0, 1, 1, 2])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def smoothed():
    points = torch.rand(6, 1, 2, 3, generator=generator(), dtype=torch.float64) * 2 - 1
    return SmoothedImages(points, 0.3)


def law(smoothed, signal=1.0, noise=0.0):
    spread = math.sqrt(signal**2 * smoothed.width**2 + noise**2)
    parts = Independent(Normal(signal * smoothed.points, spread), 3)
    return MixtureSameFamily(Categorical(torch.ones(len(smoothed.points))), parts)


def column(value, rows):
    return torch.full((rows, 1), value, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shares_and_sums_are_those_of_torch_without_denormal_numbers(dtype):
    scores = 60 * torch.randn(40, 30, generator=generator(20), dtype=dtype)
    scores.requires_grad_()
    assert torch.allclose(shares(scores), scores.softmax(-1), rtol=1e-5, atol=1e-30)
    assert torch.allclose(log_sum(scores), scores.logsumexp(-1))
    assert not bool((shares(scores) < torch.finfo(torch.float32).tiny).any())
    (slope,) = torch.autograd.grad(log_sum(scores).sum(), scores)
    assert torch.allclose(slope, scores.softmax(-1), atol=1e-6)


@pytest.mark.parametrize(("signal", "noise"), [(1.0, 0.0), (0.8, 0.6), (0.28, 0.96)])
def test_the_density_is_that_of_the_mixture(smoothed, signal, noise):
    x = torch.randn(50, 1, 2, 3, generator=generator(1), dtype=torch.float64)
    expected = law(smoothed, signal, noise).log_prob(x)
    assert torch.allclose(smoothed.log_prob(x, signal, noise), expected)
    rows = smoothed.log_prob(x, column(signal, 50), column(noise, 50))
    assert torch.allclose(rows, expected)


def test_draws_have_the_moments_of_the_mixture(smoothed):
    x = smoothed.sample(20_000, generator=generator(14))
    assert x.equal(smoothed.sample(20_000, generator=generator(14)))
    exact = law(smoothed)
    assert torch.allclose(x.mean(0), exact.mean, atol=5 * float(exact.stddev.max()) / 20_000**0.5)
    assert torch.allclose(x.var(0), exact.variance, rtol=0.05)
    eps = torch.randn(20_000, *smoothed.points.shape, generator=generator(15)).double()
    entropy = exact.log_prob((smoothed.points + smoothed.width * eps).flatten(0, 1))
    assert float(smoothed.log_prob(x).mean()) == pytest.approx(float(entropy.mean()), abs=0.05)


@pytest.mark.parametrize("level", [1, 5, 10])
def test_the_denoiser_is_tweedies(smoothed, level):
    """E[x_0 | x] = (x + noise^2 grad log p(x)) / signal."""
    schedule = cosine_schedule(10)
    signal, noise = float(schedule.signal[level]), float(schedule.noise[level])
    x = torch.randn(20, 1, 2, 3, generator=generator(3), dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(smoothed.log_prob(x, signal, noise).sum(), x)
    found = SmoothedDenoiser(smoothed, schedule)(x, torch.full((20,), level), None)
    assert torch.allclose(found, (x + noise**2 * score) / signal, rtol=1e-9, atol=1e-9)


def test_the_denoiser_is_the_mean_of_draws_weighted_by_their_likelihood(smoothed):
    schedule = cosine_schedule(10)
    x, level = smoothed.sample(3, generator=generator(4)), torch.tensor([4, 6, 9])
    x0 = smoothed.sample(200_000, generator=generator(5)).flatten(1)
    found = SmoothedDenoiser(smoothed, schedule)(x, level, None).flatten(1)
    for row in range(3):
        signal, noise = schedule.signal[level[row]], schedule.noise[level[row]]
        log_weight = Normal(signal * x0, noise).log_prob(x[row].flatten()).sum(1)
        weight = log_weight.softmax(0)[:, None]
        mean = (weight * x0).sum(0)
        error = (weight.square() * (x0 - mean).square()).sum(0).sqrt()
        assert bool(((found[row] - mean).abs() < 4.5 * error).all())


def test_the_unet_is_called_as_that_of_diffusers(smoothed):
    expected = list(inspect.signature(UNet2DModel.forward).parameters)
    assert list(inspect.signature(SmoothedUNet.forward).parameters) == expected
    scheduler = DDPMScheduler(num_train_timesteps=40, clip_sample=False)
    unet = SmoothedUNet(smoothed, scheduler.alphas_cumprod)
    x = torch.randn(4, 1, 2, 3, generator=generator(6), dtype=torch.float64)
    one = unet(x, 17)
    assert one.sample.equal(unet(x, torch.tensor(17), return_dict=False)[0])
    assert one.sample.equal(unet(x, torch.full((4,), 17), class_labels=None).sample)
    mixed = unet(x, torch.tensor([3, 17, 0, 39])).sample
    assert torch.allclose(mixed[1], one.sample[1])


def test_its_noise_prediction_is_minus_noise_times_the_score(smoothed):
    squared = torch.linspace(0.99, 0.05, 8, dtype=torch.float64)
    x = torch.randn(8, 1, 2, 3, generator=generator(7), dtype=torch.float64).requires_grad_()
    signal, noise = squared.sqrt()[:, None], (1 - squared).sqrt()[:, None]
    (score,) = torch.autograd.grad(smoothed.log_prob(x, signal, noise).sum(), x)
    found = SmoothedUNet(smoothed, squared)(x, torch.arange(8)).sample
    assert torch.allclose(found, -noise[:, :, None, None] * score, rtol=1e-9, atol=1e-9)


def test_the_adapters_see_the_exact_denoiser_in_it(smoothed):
    scheduler = DDPMScheduler(num_train_timesteps=100, clip_sample=False)
    grid = scheduler_grid(scheduler, 20)
    unet = SmoothedUNet(smoothed, scheduler.alphas_cumprod)
    adapted = denoiser_from_unet(unet, scheduler, grid)
    level = torch.arange(1, 21)
    x = torch.randn(20, 1, 2, 3, generator=generator(8), dtype=torch.float64)
    exact = SmoothedDenoiser(smoothed, grid.schedule)(x, level, None)
    assert torch.allclose(adapted(x, level, None), exact, atol=1e-5)


@pytest.mark.parametrize("classes", [[0], [1, 2]])
def test_the_posterior_is_bayes_rule_at_every_point(smoothed, classes):
    reward = BayesReward(smoothed, LABELS, classes)
    x = torch.randn(50, 1, 2, 3, generator=generator(9), dtype=torch.float64)
    joint = smoothed.log_prob(x) + reward(x, None)
    assert torch.allclose(joint - reward.log_z, reward.posterior.log_prob(x))
    assert reward.log_z == pytest.approx(math.log(0.5))


def test_the_evidence_and_the_class_masses_by_drawing(smoothed):
    x = smoothed.sample(50_000, generator=generator(10))
    probabilities = BayesClassifier(smoothed, LABELS, 3)(x).exp()
    assert torch.allclose(probabilities.sum(1), torch.ones(50_000).double())
    error = probabilities.std(0) / 50_000**0.5
    wanted = torch.tensor([3, 2, 1]) / 6
    assert bool(((probabilities.mean(0) - wanted).abs() < 4 * error).all())


def test_the_classifier_and_the_reward_agree(smoothed):
    classifier = BayesClassifier(smoothed, LABELS, 3)
    x = smoothed.sample(20, generator=generator(11))
    rewards = [BayesReward(smoothed, LABELS, [label])(x, None) for label in range(3)]
    assert torch.allclose(classifier(x), torch.stack(rewards, 1))
    labels = torch.arange(20) % 3
    amortised = ConditionalClassProbability(classifier)(x, labels)
    assert torch.allclose(amortised, classifier(x).gather(1, labels[:, None]).squeeze(1))


def test_digits_in_float32_are_as_exact_as_in_float64():
    digits = load_images()
    points, schedule = to_model_space(digits.images), cosine_schedule(20)
    single, double = SmoothedImages(points, 0.1), SmoothedImages(points.double(), 0.1)
    x, level = torch.randn(40, 1, 8, 8, generator=generator(12)), torch.arange(1, 21).repeat(2)
    x0 = points[::45]
    signal, noise = schedule.signal[level].float(), schedule.noise[level].float()
    x = signal[:, None, None, None] * x0 + noise[:, None, None, None] * x
    found = SmoothedDenoiser(single, schedule)(x, level, None)
    exact = SmoothedDenoiser(double, schedule)(x.double(), level, None)
    assert float((found - exact).abs().max()) < 2e-3
    reward = BayesReward(single, digits.labels, range(0, 10, 2))
    assert reward.log_z == pytest.approx(math.log(891 / 1797))
    exact_reward = BayesReward(double, digits.labels, range(0, 10, 2))
    inside = single.sample(200, generator=generator(13))
    assert torch.allclose(
        reward(inside, None).double(), exact_reward(inside.double(), None), atol=5e-3
    )


def test_what_does_not_fit_is_refused(smoothed):
    with pytest.raises(InputError, match=r"not \(6, 2\) and 0.1"):
        SmoothedImages(torch.zeros(6, 2), 0.1)
    with pytest.raises(InputError, match="a width above 0"):
        SmoothedImages(smoothed.points, 0.0)
    with pytest.raises(InputError, match=r"no point is of class 7; the labels are \[0, 1, 2\]"):
        BayesReward(smoothed, LABELS, [7])
    with pytest.raises(InputError, match=r"6 points came with labels \(5,\)"):
        BayesClassifier(smoothed, LABELS[:5], 3)
