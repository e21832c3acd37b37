"""Inverse problems: calibration and means tell the posterior from others, on Gaussian images."""

import math
from dataclasses import replace

import pytest
import torch

from rtb_rl.adapters.pipelines import open_pipeline
from rtb_rl.baselines.draws import Draws
from rtb_rl.baselines.weighted import posterior_by_weight
from rtb_rl.core import importance_log_z
from rtb_rl.errors import InputError
from rtb_rl.tasks.image.inverse import InverseSettings, compare_methods, denoising_start
from rtb_rl.tasks.image.measurements import Inpainting, Measurement
from rtb_rl.tasks.image.observations import (
    judge,
    markdown,
    measurements,
    observe,
    pool_draws,
    posterior_draws,
)
from rtb_rl.tasks.image.posterior import fit_posterior, posterior_task
from rtb_rl.tasks.image.prior import PriorSettings, new_scheduler, new_unet
from rtb_rl.tasks.image.target import class_target, every_class_target, measurement_target
from rtb_rl.training import FinetuneSettings, Mix, PretrainSettings

SHAPE, SIGMA = (1, 4, 4), 0.5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def observed():
    """200 images of N(0, I) with the lower half hidden."""
    truth = torch.randn(200, *SHAPE, generator=generator())
    return observe(measurements(SHAPE, sigma=SIGMA)["inpainting"], truth, generator=generator(1))


def gaussian_posterior(observed, n, *, mean=1.0, spread=1.0):
    """Draws of p(x | y) with its mean and its spread multiplied."""
    y = observed.measurement.adjoint(observed.condition["observation"])
    gain = 1 / (1 + SIGMA**2)
    std = torch.ones(4, 4)
    std[:2] = SIGMA * gain**0.5
    eps = torch.randn(len(y), n, *SHAPE, generator=generator(2))
    return Draws(mean * gain * y[:, None] + spread * std * eps, 0.0)


def p_values(row):
    return [value for key, value in row.items() if key.startswith("p of ")]


def test_the_lower_half_is_hidden():
    operator = measurements(SHAPE, sigma=SIGMA)["inpainting"].operator
    x = torch.arange(16.0).reshape(1, *SHAPE)
    assert operator.apply(x).flatten().tolist() == list(range(8))


def test_draws_of_the_posterior_are_calibrated(observed):
    row = judge(gaussian_posterior(observed, 12), observed, generator=generator(3))
    assert min(p_values(row)) > 0.01
    assert abs(row["excess"]) < 3


@pytest.mark.parametrize(
    ("wrong", "excess"), [({"spread": 0.5}, 3), ({"spread": 1.5}, -3), ({"mean": 0.0}, -3)]
)
def test_draws_of_another_law_are_not(observed, wrong, excess):
    row = judge(gaussian_posterior(observed, 12, **wrong), observed, generator=generator(3))
    assert min(p_values(row)) < 1e-4
    assert row["excess"] / excess > 1


def test_psnr_is_that_of_the_exact_posterior(observed):
    """E|x - truth|^2 is twice the posterior's variance, of the mean of draws once."""
    row = judge(gaussian_posterior(observed, 100), observed, generator=generator(3))
    variance = (SIGMA**2 / (1 + SIGMA**2) + 1) / 2
    for name, share in (("psnr", 2.0), ("psnr_mean", 1.01)):
        # the mean over images of a logarithm is above the logarithm of the mean
        least = 10 * math.log10(4 / (share * variance))
        assert least < row[name] < least + 1.5


def test_weighted_prior_draws_find_the_evidence_of_an_observation():
    mask = measurements((1, 2, 1), sigma=SIGMA)["inpainting"]
    truth = torch.randn(5, 1, 2, 1, generator=generator(4))
    observed = observe(mask, truth, generator=generator(5))
    pool = torch.randn(40_000, 1, 2, 1, generator=generator(6))
    draws = pool_draws(pool, 10, observed, 3000, generator=generator(7))
    y = observed.condition["observation"].flatten()
    evidence = torch.distributions.Normal(0.0, (1 + SIGMA**2) ** 0.5).log_prob(y)
    assert draws.log_z is not None
    assert torch.allclose(draws.log_z.float(), evidence, atol=0.05)
    assert torch.allclose(draws.x0[:, :, 0, 0].mean(1).squeeze(), y / (1 + SIGMA**2), atol=0.06)


@pytest.fixture
def prior():
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

    settings = PriorSettings(widths=(16, 16), attention=False)
    unet = new_unet(SHAPE, settings, generator=generator(8))
    prior = open_pipeline(DDPMPipeline(unet, new_scheduler(4)), levels=4)
    prior.denoiser.requires_grad_(False)
    return prior


def tiny():
    given = InverseSettings(draws=4, start=PretrainSettings(steps=60, batch=32, average_decay=0.8))
    tuned = FinetuneSettings(
        updates=2, conditions=2, mix=Mix(on_policy=1, data=1), learning_rate=1e-5
    )
    posterior = replace(
        given.posterior, finetune=tuned, diagnostic_rows=2, diagnostic_samples=2, log_every=1
    )
    return replace(given, posterior=posterior)


def test_draws_of_the_prior_by_weight_are_of_the_posterior(prior):
    """As much of log p(y | x0) as a large pool of prior draws has by its weights."""
    truth = prior.sampler.sample(None, 3, generator=generator(11))
    loose = measurements(SHAPE, sigma=2.0)["inpainting"]
    observed = observe(loose, truth, generator=generator(12))
    task, _ = posterior_task(prior, measurement_target(loose, truth), tiny().posterior, seed=0)
    paths, n = 4000, 2000
    given = {"paths": paths, "batch": 1000, "generator": generator(13)}
    draws = posterior_by_weight(task, observed.condition, n, **given)
    assert draws.x0.shape == (3, n, *SHAPE)
    assert draws.calls == 2 * 4 * paths / n
    pool = prior.sampler.sample(None, paths, generator=generator(14))
    score = observed.log_likelihood(pool.expand(3, *pool.shape))
    expected = (score.softmax(1) * score).sum(1)
    assert bool((score.mean(1) < expected - 0.4).all())
    assert torch.allclose(observed.log_likelihood(draws.x0).mean(1), expected, atol=0.3)


def test_paths_of_the_prior_weigh_what_their_images_do(prior, observed):
    target = measurement_target(observed.measurement, observed.truth)
    task, _ = posterior_task(prior, target, tiny().posterior, seed=0)
    draws, bound = posterior_draws(task, observed.condition, 5, generator=generator(9))
    weight = observed.log_likelihood(draws.x0).double()
    assert bound == pytest.approx(float(weight.mean()), abs=1e-3)
    assert draws.log_z is not None
    assert torch.allclose(draws.log_z, importance_log_z(weight)[0], atol=1e-3)


def test_the_start_explains_observations_better_than_the_prior(prior, observed, tmp_path):
    settings = tiny()
    target = measurement_target(observed.measurement, observed.truth)
    started, calls = denoising_start(tmp_path, prior, target, settings.start, seed=0)
    assert calls == 3 * 60 * 32
    bounds = []
    for one in (target, started):
        task, _ = posterior_task(prior, one, settings.posterior, seed=0)
        bounds.append(posterior_draws(task, observed.condition, 4, generator=generator(10))[1])
    assert bounds[1] > bounds[0] + 1


def test_all_methods_are_compared_once(prior, observed, tmp_path, monkeypatch):
    few = replace(
        observed,
        truth=observed.truth[:3],
        condition={"observation": observed.condition["observation"][:3]},
    )
    pool = torch.randn(50, *SHAPE, generator=generator(11))
    rows = compare_methods(tmp_path, prior, few, pool, tiny(), seed=0)
    assert rows["DPS"]["calls"] == rows["LGD-MC"]["calls"] == rows["twisted SMC"]["calls"] == 12
    assert rows["RTB, by weight"]["calls"] == 12
    assert rows["RTB"]["calls"] == 4
    assert rows["prior draws by weight"]["calls"] == 50
    assert rows["RTB"]["training_calls"] > rows["denoising start"]["training_calls"]
    monkeypatch.setattr("rtb_rl.tasks.image.inverse.judge", None)
    assert compare_methods(tmp_path, prior, few, pool, tiny(), seed=0) == rows
    assert len(markdown(rows).splitlines()) == 2 + len(rows)
    for other, given in (
        (observe(few.measurement, few.truth, generator=generator(2)), tiny()),
        (few, replace(tiny(), draws=5)),
    ):
        with pytest.raises(InputError, match="run of another configuration"):
            compare_methods(tmp_path, prior, other, pool, given, seed=0)


def test_a_directory_belongs_to_one_measurement_and_one_pool(prior, observed, tmp_path):
    pool = torch.randn(50, *SHAPE, generator=generator(11))
    other = Inpainting(torch.eye(4).bool())
    half, shifted = observed.measurement, pool + 0.1
    targets = [
        measurement_target(one, draws)
        for one, draws in (
            (half, pool),
            (Measurement(half.operator, 2 * SIGMA), pool),
            (Measurement(other, SIGMA), pool),
            (half, shifted),
        )
    ]
    settings = tiny().posterior
    fit_posterior(tmp_path, prior, targets[0], settings)
    for target in targets[1:]:
        with pytest.raises(InputError, match="run of another configuration"):
            fit_posterior(tmp_path, prior, target, settings)


def test_another_classifier_is_another_target():
    one, other = (torch.nn.Linear(2, 2) for _ in range(2))
    facts = [class_target(one, [0]).facts, every_class_target(one, 2).facts]
    assert facts[0] == facts[1] != class_target(other, [0]).facts


def test_a_beta_that_truths_know_nothing_of_is_refused(prior, observed, tmp_path):
    given = tiny()
    tuned = replace(given.posterior.finetune, beta=2.0)
    strong = replace(given, posterior=replace(given.posterior, finetune=tuned))
    with pytest.raises(InputError, match="beta is 2.0"):
        compare_methods(tmp_path, prior, observed, observed.truth, strong, seed=0)
    assert not any(tmp_path.iterdir())
