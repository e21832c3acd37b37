"""Linear measurements: adjoints, matrices, likelihoods, and what a network is shown."""

import pytest
import torch
from torch.distributions import Normal

from rtb_rl.baselines import dps, lgd_mc, normalised_step
from rtb_rl.core import GaussianDiffusion, cosine_schedule, zero_terminal_signal
from rtb_rl.core.gaussian import small_spread
from rtb_rl.errors import InputError
from rtb_rl.tasks.image.measurements import (
    GaussianBlur,
    Inpainting,
    Measurement,
    SuperResolution,
    measurement_reward,
)

SHAPE = (2, 6, 8)
MASK = torch.rand(6, 8, generator=torch.Generator().manual_seed(3)) < 0.4
OPERATORS = {
    "inpainting": Inpainting(MASK),
    "super-resolution": SuperResolution(2),
    "blur": GaussianBlur(1.2, 5),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def matrix(operator):
    """A as rows of outputs and columns of inputs."""
    inputs = torch.eye(96, dtype=torch.float64).reshape(96, *SHAPE)
    return operator.apply(inputs).flatten(1).T


@pytest.mark.parametrize("name", OPERATORS)
def test_the_adjoint_is_the_transpose(name):
    operator, x = OPERATORS[name], normal(3, *SHAPE)
    y = normal(*operator.apply(x).shape, seed=1)
    left = (operator.apply(x) * y).flatten(1).sum(1)
    right = (x * operator.adjoint(y)).flatten(1).sum(1)
    assert torch.allclose(left, right, rtol=1e-12)
    assert torch.allclose(operator.adjoint(y).flatten(1), y.flatten(1) @ matrix(operator))


@pytest.mark.parametrize("name", OPERATORS)
def test_it_is_linear(name):
    operator, a, b = OPERATORS[name], normal(3, *SHAPE), normal(3, *SHAPE, seed=1)
    both = 2 * operator.apply(a) - 3 * operator.apply(b)
    assert torch.allclose(operator.apply(2 * a - 3 * b), both)


def test_what_is_visible_squares_and_the_blur_of_a_point():
    x = normal(1, *SHAPE)
    seen = OPERATORS["inpainting"].apply(x)
    assert seen.equal(torch.stack([channel[MASK] for channel in x[0]])[None])
    squares = OPERATORS["super-resolution"].apply(x)
    assert torch.allclose(squares[0, 1, 2, 3], x[0, 1, 4:6, 6:8].mean())
    point = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    point[0, 0, 4, 4] = 1
    blurred = GaussianBlur(1.2, 5).apply(point)[0, 0]
    assert float(blurred.sum()) == pytest.approx(1)
    ratio = Normal(0, 1.2).log_prob(torch.tensor([1.0, 2.0])).sum() - 2 * Normal(0, 1.2).log_prob(
        torch.tensor(0.0)
    )
    assert float((blurred[5, 6] / blurred[4, 4]).log()) == pytest.approx(float(ratio))
    assert int((blurred > 0).sum()) == 25


@pytest.mark.parametrize("name", OPERATORS)
def test_the_likelihood_is_that_of_independent_normals(name):
    measurement, x = Measurement(OPERATORS[name], 0.3), normal(3, *SHAPE)
    y = measurement.observe(x, generator=generator(4))
    expected = Normal(measurement.apply(x), 0.3).log_prob(y).flatten(1).sum(1)
    assert torch.allclose(measurement.log_likelihood(x, y), expected)
    assert torch.allclose(measurement_reward(measurement)(x, {"observation": y}), expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_gradient_of_the_likelihood(name):
    """A^T (y - A x) / sigma^2."""
    measurement, x = Measurement(OPERATORS[name], 0.3), normal(3, *SHAPE).requires_grad_()
    reward = measurement_reward(measurement)
    y = measurement.observe(x.detach(), generator=generator(4))
    (found,) = torch.autograd.grad(reward(x, {"observation": y}).sum(), x)
    assert reward.differentiable
    assert torch.allclose(found, measurement.adjoint(y - measurement.apply(x)) / 0.3**2)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 0.4, 2.0])
@pytest.mark.parametrize("beta", [1.0, 0.25])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_normalised_step_is_the_published_one(name, beta, sigma):
    """x[k-1] moves by -(zeta' / |y - A x0|) grad |y - A x0|^2, whatever the density's constant."""
    schedule = zero_terminal_signal(cosine_schedule(2))
    diffusion = GaussianDiffusion(
        schedule, SHAPE, small_spread(schedule, floor=0.05), dtype=torch.float64
    )
    measurement, zeta = Measurement(OPERATORS[name], sigma), 0.3
    y = measurement.apply(normal(2, *SHAPE, seed=1))
    visited, steps = [], []

    def denoiser(x, level, condition):
        visited.append(x.detach())
        return 0.5 * x + x.sin()

    def checked(guidance, kernel):
        with torch.enable_grad():
            x = visited[-1].clone().requires_grad_()
            squared = (y - measurement.apply(0.5 * x + x.sin())).flatten(1).square().sum(1)
            (gradient,) = torch.autograd.grad(squared.sum(), x)
        strength = 2 * zeta * sigma / beta**0.5  # r^beta has the deviation sigma / sqrt(beta)
        found = normalised_step(strength)(guidance, kernel)
        expected = -zeta / squared.detach().sqrt().reshape(-1, 1, 1, 1) * gradient
        torch.testing.assert_close(found, expected)
        steps.append(found)
        return found

    condition = {"observation": y}
    reward = measurement_reward(measurement)
    dps(diffusion, denoiser, reward, condition, 1, beta=beta, step=checked, generator=generator())
    assert len(steps) == 2 and all(float(step.abs().max()) > 1e-3 for step in steps)


def test_the_normalised_step_of_smoothed_measurements_stays_below_the_point_s():
    """A mean of r^beta is no larger than its maximum, so that every step is defined."""
    schedule = zero_terminal_signal(cosine_schedule(4))
    diffusion = GaussianDiffusion(
        schedule, SHAPE, small_spread(schedule, floor=0.05), dtype=torch.float64
    )
    measurement = Measurement(SuperResolution(2), 0.05)
    condition = {"observation": measurement.apply(normal(2, *SHAPE, seed=1))}
    reward, step = measurement_reward(measurement), normalised_step(0.1)
    given = (diffusion, lambda x, level, condition: 0.9 * x, reward, condition, 3)
    assert lgd_mc(*given, step=step, generator=generator()).x0.isfinite().all()


@pytest.mark.parametrize("name", OPERATORS)
def test_observations_have_the_mean_and_the_spread(name):
    measurement = Measurement(OPERATORS[name], 0.3)
    x = normal(1, *SHAPE).expand(4000, -1, -1, -1)
    y = measurement.observe(x, generator=generator(5))
    assert y.equal(measurement.observe(x, generator=generator(5)))
    error = (y - measurement.apply(x)) / 0.3
    assert float(error.mean(0).abs().max()) < 5 / 4000**0.5
    assert float(error.square().mean()) == pytest.approx(1, abs=0.02)


def test_what_a_network_is_shown():
    x = normal(2, *SHAPE)
    shown = Measurement(OPERATORS["inpainting"], 1).as_image(OPERATORS["inpainting"].apply(x))
    assert shown[:, :2].equal(x * MASK)
    assert shown[:, 2].equal(MASK.double().expand(2, -1, -1))
    squares = OPERATORS["super-resolution"].apply(x)
    shown = OPERATORS["super-resolution"].as_image(squares)
    assert shown.shape == x.shape and shown[:, :, 1::2, ::2].equal(squares)
    assert torch.allclose(OPERATORS["super-resolution"].apply(shown), squares)
    assert OPERATORS["blur"].as_image(x) is x


def test_the_posterior_of_a_gaussian_image_is_kalmans():
    """log N(x; 0, I) + log likelihood - log N(y; 0, A A^T + sigma^2) is the posterior's density."""
    measurement = Measurement(OPERATORS["super-resolution"], 0.5)
    x, a = normal(4, *SHAPE), matrix(OPERATORS["super-resolution"])
    y = measurement.observe(x, generator=generator())
    covariance = torch.linalg.inv(torch.eye(96) + a.T @ a / 0.25)
    mean = y.flatten(1) @ a @ covariance.T / 0.25
    multivariate = torch.distributions.MultivariateNormal
    evidence = multivariate(torch.zeros(24).double(), a @ a.T + 0.25 * torch.eye(24))
    joint = Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1) + measurement.log_likelihood(x, y)
    posterior = multivariate(mean, covariance).log_prob(x.flatten(1))
    assert torch.allclose(joint - evidence.log_prob(y.flatten(1)), posterior)


def test_what_does_not_fit_is_refused():
    x = normal(3, *SHAPE)
    with pytest.raises(InputError, match=r"mask is \(6, 8\), the images are \(5, 8\)"):
        OPERATORS["inpainting"].apply(x[:, :, :5])
    with pytest.raises(InputError, match=r"bool \[height, width\] with a visible pixel"):
        Inpainting(torch.zeros(6, 8, dtype=torch.bool))
    with pytest.raises(InputError, match="not torch.float32"):
        Inpainting(torch.ones(6, 8))
    with pytest.raises(InputError, match="6 x 8 can't be divided into squares of 4"):
        SuperResolution(4).apply(x)
    with pytest.raises(InputError, match="odd size, not 1.0 and 4"):
        GaussianBlur(1.0, 4)
    with pytest.raises(InputError, match="sigma is 0"):
        Measurement(OPERATORS["blur"], 0)
    measurement = Measurement(OPERATORS["blur"], 0.1)
    with pytest.raises(InputError, match=r"observation is \(1, 2, 6, 8\), .* \(3, 2, 6, 8\)"):
        measurement.log_likelihood(x, x[:1])
    for condition in (None, {"y": x}):
        with pytest.raises(InputError, match="needs the condition {'observation': y}"):
            measurement_reward(measurement)(x, condition)


@pytest.mark.parametrize("factor", [0, -2])
def test_squares_without_pixels_are_refused(factor):
    with pytest.raises(InputError, match=f"squares of {factor} pixels have no mean"):
        SuperResolution(factor)
