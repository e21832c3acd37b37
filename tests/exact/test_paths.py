"""Path identities of the exact posterior: linear log-reward, start at one point or memoryless."""

from collections.abc import Iterator

import pytest
import torch
from torch import Generator, Tensor

from rtb_rl.core import (
    Denoiser,
    GaussianDiffusion,
    Schedule,
    Trajectory,
    cosine_schedule,
    log_ratio,
    log_weight,
    noise_back,
    residual,
    rollout,
    rollout_against,
    rtb_loss,
    vp_schedule,
    zero_terminal_signal,
)
from rtb_rl.core.gaussian import large_spread, small_spread
from rtb_rl.tasks.toy import (
    GaussianDenoiser,
    Quadratic,
    chain_of,
    denoiser_of,
    linear_reward,
    tilt,
)

SLOPE = torch.tensor([1.5, -2.0, 0.3], dtype=torch.float64)
MEAN = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
VARIANCE = torch.tensor([0.25, 1.0, 2.0], dtype=torch.float64)
BATCH, BETA = 16, 2.0


class FixedStart(GaussianDiffusion):
    """A chain that starts at one point."""

    def start(self, batch: int, *, generator: Generator) -> Tensor:
        return torch.full((batch, *self.event_shape), 0.7, dtype=self.dtype)


def memoryless(spread: str) -> GaussianDiffusion:
    schedule = zero_terminal_signal(vp_schedule(6))
    std = {"small": small_spread(schedule, floor=0.2), "large": large_spread(schedule)}[spread]
    return GaussianDiffusion(schedule, (3,), std, dtype=torch.float64)


def from_one_point(spread: str) -> GaussianDiffusion:
    schedule = cosine_schedule(5)
    std = {"small": small_spread(schedule, floor=0.2), "large": large_spread(schedule)}[spread]
    return FixedStart(schedule, (3,), std, dtype=torch.float64)


CASES = {
    f"{make.__name__}-{spread}": make(spread)
    for make in (memoryless, from_one_point)
    for spread in ("small", "large")
}


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def diffusion(request: pytest.FixtureRequest) -> GaussianDiffusion:
    return request.param


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def exact_posterior(
    diffusion: GaussianDiffusion, prior: Denoiser, slope: Tensor
) -> tuple[Denoiser, Quadratic]:
    """The tilted chain for a linear reward, with the prior's spread, and log E[exp | x_K]."""
    tilted, value = tilt(chain_of(diffusion, prior), linear_reward(slope))
    return denoiser_of(diffusion, tilted), value


def models(diffusion: GaussianDiffusion) -> tuple[Denoiser, Denoiser, Tensor]:
    """Prior, exact posterior for exp(BETA SLOPE . x0), and log Z."""
    prior = GaussianDenoiser(Schedule(diffusion.signal.flatten()), MEAN, VARIANCE)
    posterior, value = exact_posterior(diffusion, prior, BETA * SLOPE)
    log_z = value(diffusion.start(1, generator=seeded(99)))
    return prior, posterior, log_z


def plus(first: Denoiser, second: Denoiser) -> Denoiser:
    return lambda x, level, condition: first(x, level, condition) + second(x, level, condition)


def constant(value: float) -> Denoiser:
    return lambda x, level, condition: torch.full_like(x, value)


def all_behaviours(
    diffusion: GaussianDiffusion, prior: Denoiser, posterior: Denoiser
) -> Iterator[tuple[str, Trajectory]]:
    """Paths from anywhere, each moved to begin where the diffusion begins."""
    wide = diffusion.with_spread(3 * diffusion.std[1:].flatten())
    x0 = 3 * torch.randn((BATCH, 3), generator=seeded(1), dtype=torch.float64)
    noise = torch.randn((diffusion.levels + 1, BATCH, 3), generator=seeded(2), dtype=torch.float64)
    paths = {
        "posterior": rollout(diffusion, posterior, None, BATCH, generator=seeded(3)),
        "prior": rollout(diffusion, prior, None, BATCH, generator=seeded(4)),
        "widened": rollout(wide, posterior, None, BATCH, generator=seeded(5)),
        "noised data": noise_back(diffusion, x0, None, generator=seeded(6)),
        "absurd": Trajectory(20 * noise - 7),
        "constant": Trajectory(torch.full_like(noise, 5.0)),
    }
    for name, path in paths.items():
        start = diffusion.start(BATCH, generator=seeded(7))
        yield name, Trajectory(torch.cat([path.x[:-1], start[None]]))


def test_the_exact_posterior_has_residual_zero_on_every_path(diffusion: GaussianDiffusion):
    prior, posterior, log_z = models(diffusion)
    for name, path in all_behaviours(diffusion, prior, posterior):
        ratio = log_ratio(diffusion, posterior, prior, path)
        delta = residual(log_z, log_weight(path.x0 @ SLOPE, ratio, BETA))
        assert delta.abs().max() < 1e-10, name


def test_a_posterior_off_by_a_little_has_a_residual(diffusion: GaussianDiffusion):
    prior, posterior, log_z = models(diffusion)
    for name, path in all_behaviours(diffusion, prior, posterior):
        ratio = log_ratio(diffusion, plus(posterior, constant(1e-4)), prior, path)
        delta = residual(log_z, log_weight(path.x0 @ SLOPE, ratio, BETA))
        assert delta.abs().max() > 1e-5, name


def test_the_exact_log_ratio_depends_on_the_endpoint_only(diffusion: GaussianDiffusion):
    prior, posterior, _ = models(diffusion)
    x0 = torch.randn((1, 3), generator=seeded(), dtype=torch.float64)
    ratios = []
    for _, path in all_behaviours(diffusion, prior, posterior):
        same_end = Trajectory(torch.cat([x0.expand(1, BATCH, 3), path.x[1:]]))
        ratios.append(log_ratio(diffusion, posterior, prior, same_end))
    ratios = torch.cat(ratios)
    assert (ratios - ratios[0]).abs().max() < 1e-10
    assert ratios[0].abs() > 1e-2


def test_log_z_of_the_recursion_is_the_closed_form_of_the_marginal():
    """Memoryless: log E exp(b x) of the prior's own final law N(m, v) is b m + b^2 v / 2."""
    for spread in ("small", "large"):
        diffusion = CASES[f"memoryless-{spread}"]
        prior, posterior, log_z = models(diffusion)
        zero, one = torch.zeros_like(MEAN), torch.ones_like(MEAN)
        mean, variance = chain_of(diffusion, prior).final(zero, one)
        slope = BETA * SLOPE
        expected = (slope * mean + slope**2 * variance / 2).sum()
        torch.testing.assert_close(log_z, expected[None], rtol=1e-12, atol=0)
        tilted = chain_of(diffusion, posterior).final(zero, one)
        torch.testing.assert_close(tilted, (mean + variance * slope, variance))


def test_with_signal_left_no_scalar_log_z_is_right():
    """A chain that starts from N(0, I) and remembers it: log E[r | x_K] varies with x_K."""
    schedule = Schedule(torch.tensor([1.0, 0.9, 0.8, 0.65, 0.5], dtype=torch.float64))
    with pytest.warns(UserWarning, match=r"signal 0\.500"):
        diffusion = GaussianDiffusion(schedule, (3,), large_spread(schedule), dtype=torch.float64)
    prior = GaussianDenoiser(schedule, MEAN, VARIANCE)
    posterior, value = exact_posterior(diffusion, prior, BETA * SLOPE)
    path, ratio = rollout_against(diffusion, posterior, prior, None, BATCH, generator=seeded())
    weight = log_weight(linear_reward(SLOPE)(path.x0), ratio, BETA)
    assert weight.std() > 0.5
    assert residual(value(path.x[-1]), weight).abs().max() < 1e-10


def test_loss_is_zero_at_the_exact_posterior_and_only_there(diffusion: GaussianDiffusion):
    prior, posterior, log_z = models(diffusion)
    path, ratio = rollout_against(diffusion, posterior, prior, None, 500, generator=seeded())
    weight = log_weight(path.x0 @ SLOPE, ratio, BETA)
    assert rtb_loss(residual(log_z, weight)) < 1e-20
    assert rtb_loss(residual(log_z + 0.1, weight)).item() == pytest.approx(0.01)
