"""Linear-Gaussian chains: frozen numbers, bounds on log Z, and a posterior learnt from scratch."""

import contextlib
import math

import pytest
import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    Denoiser,
    GaussianDiffusion,
    ScalarLogZ,
    Schedule,
    Trajectory,
    backward_in_chunks,
    cosine_schedule,
    effective_sample_size,
    elbo,
    importance_log_z,
    log_ratio,
    log_weight,
    residual,
    rollout,
    rollout_against,
    rtb_loss,
    zero_terminal_signal,
)
from rtb_rl.core.gaussian import large_spread
from rtb_rl.core.protocols import Condition
from rtb_rl.tasks.toy import (
    Chain,
    GaussianDenoiser,
    chain_of,
    denoiser_of,
    exact_posterior,
    linear_reward,
    squared_reward,
    tilt,
)


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


ZERO, ONE = number(0.0), number(1.0)

# Data N(1, 0.25), exact score, spread sqrt(beta), log r = -(3 / 2) (x - 1.8)^2. Grid of the
# released code: 76 betas, of which the step to level 0 is never taken. Columns: model marginal,
# log Z, std of log E[r | x_K] over the start, posterior, and what the optimal steps give from the
# unchanged start N(0, 1).
FROZEN = {
    "reference betas": (
        1.0,
        [(0.8274, 0.2754), -1.0780618, 0.4658, (1.2675, 0.1508), (1.2033, 0.1535)],
    ),
    "betas x 1000 / 75": (
        1000 / 75,
        [(0.9976, 0.2658), -0.8305369, 0.0011, (1.3536, 0.1479), (1.3536, 0.1479)],
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_numbers_of_the_published_chain(name: str):
    scale, (marginal, log_z, start_std, posterior, fixed_start) = FROZEN[name]
    beta = scale * (1e-4 + torch.arange(1, 77, dtype=torch.float64) * 0.0199 / 75)
    schedule = Schedule(torch.cat([ONE, (1 - beta).cumprod(0).sqrt()]))
    with pytest.warns(UserWarning) if scale == 1 else contextlib.nullcontext():
        diffusion = GaussianDiffusion(schedule, (1,), large_spread(schedule), dtype=torch.float64)
    prior = GaussianDenoiser(schedule, ONE, number(0.25))
    chain = chain_of(diffusion, prior, last_level=1)
    tilted, value = tilt(chain, squared_reward(number(3.0), number(1.8)))
    spread = (value.curvature**2 / 2 + value.slope**2).sqrt()
    assert diffusion.signal_left == pytest.approx(0.674 if scale == 1 else 0.0031, abs=5e-4)
    assert [float(v) for v in chain.final(ZERO, ONE)] == pytest.approx(marginal, abs=6e-5)
    assert float(value.log_mean_exp()) == pytest.approx(log_z, abs=6e-8)
    assert float(spread) == pytest.approx(start_std, abs=6e-5)
    start = value.tilted_start()
    assert [float(v) for v in tilted.final(*start)] == pytest.approx(posterior, abs=6e-5)
    assert [float(v) for v in tilted.final(ZERO, ONE)] == pytest.approx(fixed_start, abs=6e-5)


MEMORYLESS = zero_terminal_signal(cosine_schedule(8))
CHAIN = GaussianDiffusion(MEMORYLESS, (1,), large_spread(MEMORYLESS), dtype=torch.float64)
PRIOR = GaussianDenoiser(MEMORYLESS, ONE, number(0.25))
REWARD = squared_reward(number(3.0), number(1.8))


def tilted_chain() -> tuple[Chain, float]:
    """The chain tilted by REWARD, and log Z."""
    tilted, value = tilt(chain_of(CHAIN, PRIOR), REWARD)
    return tilted, float(value.log_mean_exp())


def test_the_tilted_chain_ends_in_the_tilted_marginal():
    mean, variance = chain_of(CHAIN, PRIOR).final(ZERO, ONE)
    tilted, log_z = tilted_chain()
    precision = 1 / variance + 3
    expected = ((mean / variance + 3 * 1.8) / precision, 1 / precision)
    torch.testing.assert_close(tilted.final(ZERO, ONE), expected, rtol=1e-12, atol=0)
    scale = 1 + 3 * float(variance)
    closed = -math.log(scale) / 2 - 3 * float(mean - 1.8) ** 2 / (2 * scale)
    assert log_z == pytest.approx(closed, rel=1e-12)


def log_weights(paths_of: GaussianDiffusion, count: int, *, seed: int) -> tuple[Tensor, float]:
    """Log-weights of the best posterior with the prior's spread, on paths of the tilted steps drawn
    with the spread of `paths_of`; and log Z."""
    tilted, log_z = tilted_chain()
    posterior = denoiser_of(CHAIN, tilted)
    path = rollout(
        paths_of,
        denoiser_of(paths_of, tilted),
        None,
        count,
        generator=Generator().manual_seed(seed),
    )
    return log_weight(REWARD(path.x0), log_ratio(CHAIN, posterior, PRIOR, path), 1.0), log_z


def test_a_learned_spread_makes_a_concave_reward_exactly_realisable():
    """Residual 0 on any path once the steps may be narrower than the prior's; not without."""
    tilted, log_z = tilted_chain()
    mean = denoiser_of(CHAIN, tilted)
    narrowed, _ = exact_posterior(CHAIN, PRIOR, REWARD)
    generator = Generator().manual_seed(0)
    anything = torch.randn((CHAIN.levels + 1, 20, 1), generator=generator, dtype=torch.float64)
    paths = [
        Trajectory(5 * anything),
        rollout(CHAIN, PRIOR, None, 20, generator=generator),
        rollout(CHAIN, narrowed, None, 20, generator=generator),
    ]
    for path in paths:
        narrow, wide = (
            log_weight(REWARD(path.x0), log_ratio(CHAIN, model, PRIOR, path), 1.0)
            for model in (narrowed, mean)
        )
        assert residual(number(log_z), narrow).abs().max() < 1e-9
        assert residual(number(log_z), wide).abs().max() > 0.1


def test_log_z_lies_between_the_means_over_posterior_and_target_paths():
    """E_post[log w] = log Z - KL(post || target); E_target[log w] = log Z + KL(target || post)."""
    count = 40_000
    lower, log_z = log_weights(CHAIN, count, seed=0)
    tilted, _ = tilted_chain()
    upper, _ = log_weights(CHAIN.with_spread(tilted.std), count, seed=1)
    for weights, sign in ((lower, -1), (upper, 1)):
        gap = sign * (float(elbo(weights)) - log_z)
        assert gap > 4 * float(weights.std()) / math.sqrt(count)
        assert gap < 0.5


def test_importance_weights_find_log_z_and_know_their_error():
    repeats, count = 400, 256
    weights, log_z = log_weights(CHAIN, repeats * count, seed=2)
    estimate, error = importance_log_z(weights)
    assert float(error) < 0.005
    assert float(estimate) == pytest.approx(log_z, abs=4 * float(error))
    estimates, errors = importance_log_z(weights.reshape(repeats, count))
    scores = (estimates - log_z) / errors
    assert float(scores.std()) == pytest.approx(1, abs=0.15)
    assert abs(float(scores.mean())) < 0.3
    relative = weights.reshape(repeats, count).exp()
    expected = 1 / (1 + relative.var(1, unbiased=False) / relative.mean(1) ** 2)
    torch.testing.assert_close(effective_sample_size(weights.reshape(repeats, count)), expected)


def test_prior_paths_alone_estimate_log_z():
    path, ratio = rollout_against(
        CHAIN, PRIOR, PRIOR, None, 50_000, generator=Generator().manual_seed(3)
    )
    estimate, error = importance_log_z(log_weight(REWARD(path.x0), ratio, 1.0))
    assert float(estimate) == pytest.approx(tilted_chain()[1], abs=4 * float(error))


class Affine(nn.Module):
    """scale[level] x + shift[level], both zero at first."""

    def __init__(self, levels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(levels, 1, dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros(levels, 1, dtype=torch.float64))

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        return self.scale[level - 1] * x + self.shift[level - 1]


def train(posterior: Affine, prior: Denoiser, log_z: ScalarLogZ, slope: Tensor, updates: int):
    """RTB with on-policy paths and a learned log Z, log r = slope . x."""
    reward, generator = linear_reward(slope), Generator().manual_seed(0)
    optimiser = torch.optim.Adam(
        [{"params": posterior.parameters()}, {"params": log_z.parameters(), "lr": 0.1}], lr=0.05
    )
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, total_iters=updates)
    for step in range(updates):
        path, ratio = rollout_against(CHAIN, posterior, prior, None, 64, generator=generator)
        weight = log_weight(reward(path.x0), ratio.requires_grad_(), 1.0)
        if step == 0:
            log_z.start_at(weight.detach())
        optimiser.zero_grad()
        rtb_loss(residual(log_z(None, weight), weight)).backward()
        assert ratio.grad is not None
        backward_in_chunks(CHAIN, posterior, path, ratio.grad)
        optimiser.step()
        decay.step()


def test_a_gaussian_posterior_is_learnt_from_scratch():
    """Prior N(m, v), r = exp(b x): posterior N(m + v b, v), log Z = b m + b^2 v / 2."""
    slope = number(1.2)
    mean, variance = chain_of(CHAIN, PRIOR).final(ZERO, ONE)
    posterior, log_z = Affine(CHAIN.levels), ScalarLogZ().double()
    train(posterior, PRIOR, log_z, slope, 300)
    found_mean, found_variance = chain_of(CHAIN, posterior).final(ZERO, ONE)
    assert float(found_mean) == pytest.approx(float(mean + variance * slope), rel=0.01)
    assert float(found_variance) == pytest.approx(float(variance), rel=0.02)
    exact = float(slope * mean + slope**2 * variance / 2)
    assert log_z.value.item() == pytest.approx(exact, abs=0.01)
