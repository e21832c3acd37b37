"""Paths: drawn, made from data, and two models compared on them."""

import pytest
import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    GaussianDiffusion,
    Trajectory,
    cosine_schedule,
    log_ratio,
    noise_back,
    rollout,
    rollout_against,
    rollout_step_by_step,
)
from rtb_rl.core.gaussian import large_spread

K, BATCH = 5, 6


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


class Network(nn.Module):
    """tanh of a random linear map of x, level and two conditions."""

    def __init__(self, seed: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn((6, 3), generator=seeded(seed), dtype=torch.float64))

    def forward(self, x: Tensor, level: Tensor, condition: dict[str, Tensor]) -> Tensor:
        inputs = [x, level[:, None] / K, condition["a"], condition["b"][:, None]]
        return torch.cat(inputs, 1).tanh() @ self.weight


DIFFUSION = GaussianDiffusion(
    cosine_schedule(K), (3,), large_spread(cosine_schedule(K)), dtype=torch.float64
)
CONDITION = {
    "a": torch.linspace(-1, 1, BATCH, dtype=torch.float64)[:, None],
    "b": torch.linspace(2, 3, BATCH, dtype=torch.float64),
}
POSTERIOR, PRIOR = Network(1), Network(2)


def path() -> Trajectory:
    return rollout(DIFFUSION, POSTERIOR, CONDITION, BATCH, generator=seeded(3))


def step_log_ratio(trajectory: Trajectory, level: int) -> Tensor:
    """log p_post - log p_prior of one step, as a difference of log-densities."""
    rows = torch.full((BATCH,), level)
    x, before = trajectory.x[level], trajectory.x[level - 1]
    post, prior = (
        DIFFUSION.kernel(network(x, rows, CONDITION), x, rows).log_prob(before)
        for network in (POSTERIOR, PRIOR)
    )
    return post - prior


def test_rollout_against_is_rollout_and_log_ratio():
    trajectory, total = rollout_against(
        DIFFUSION, POSTERIOR, PRIOR, CONDITION, BATCH, generator=seeded(3)
    )
    assert torch.equal(trajectory.x, path().x)
    assert trajectory.condition is CONDITION
    torch.testing.assert_close(total, log_ratio(DIFFUSION, POSTERIOR, PRIOR, trajectory))
    assert total.shape == (BATCH,) and total.abs().min() > 1e-3


def test_a_path_starts_in_noise_and_ends_in_data():
    trajectory = path()
    assert trajectory.x.shape == (K + 1, BATCH, 3) and trajectory.levels == K
    assert torch.equal(trajectory.x[K], DIFFUSION.start(BATCH, generator=seeded(3)))
    assert torch.equal(trajectory.x0, trajectory.x[0])


def test_log_ratio_of_all_levels_is_the_sum_over_single_steps():
    trajectory = path()
    expected = torch.stack([step_log_ratio(trajectory, k) for k in range(1, K + 1)]).sum(0)
    torch.testing.assert_close(log_ratio(DIFFUSION, POSTERIOR, PRIOR, trajectory), expected)


def test_log_ratio_of_chosen_levels_differs_from_path_to_path():
    trajectory = path()
    levels = torch.tensor([[1, 2, 3, 4, 5, 1], [3, 1, 5, 2, 4, 2]])
    table = torch.stack([step_log_ratio(trajectory, k) for k in range(1, K + 1)])
    expected = table[levels - 1, torch.arange(BATCH)].sum(0)
    total = log_ratio(DIFFUSION, POSTERIOR, PRIOR, trajectory, levels=levels)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("chunk", [1, 4, BATCH, 7, K * BATCH, 1000])
def test_log_ratio_does_not_depend_on_the_chunk(chunk: int):
    trajectory = path()
    whole = log_ratio(DIFFUSION, POSTERIOR, PRIOR, trajectory)
    cut = log_ratio(DIFFUSION, POSTERIOR, PRIOR, trajectory, chunk=chunk)
    torch.testing.assert_close(cut, whole, rtol=1e-13, atol=1e-13)


def test_equal_models_have_log_ratio_exactly_zero_on_any_path():
    copy = Network(1)
    for trajectory in (path(), Trajectory(1e3 * path().x, CONDITION)):
        total = log_ratio(DIFFUSION, POSTERIOR, copy, trajectory)
        assert torch.equal(total, torch.zeros(BATCH, dtype=torch.float64))


def test_antisymmetry():
    there = log_ratio(DIFFUSION, POSTERIOR, PRIOR, path())
    back = log_ratio(DIFFUSION, PRIOR, POSTERIOR, path())
    torch.testing.assert_close(there, -back, rtol=1e-12, atol=1e-12)


def test_noise_back_ends_in_the_given_points():
    x0 = torch.randn((BATCH, 3), generator=seeded(4), dtype=torch.float64)
    trajectory = noise_back(DIFFUSION, x0, CONDITION, generator=seeded(5))
    assert trajectory.x.shape == (K + 1, BATCH, 3) and trajectory.condition is CONDITION
    assert torch.equal(trajectory.x0, x0)
    assert torch.equal(trajectory.x, DIFFUSION.noise_path(x0, generator=seeded(5)))


def test_paths_carry_no_graph():
    trajectory, total = rollout_against(
        DIFFUSION, POSTERIOR, PRIOR, CONDITION, BATCH, generator=seeded()
    )
    x0 = torch.ones((BATCH, 3), dtype=torch.float64, requires_grad=True)
    back = noise_back(DIFFUSION, x0, CONDITION, generator=seeded())
    assert not any(t.requires_grad for t in (trajectory.x, total, back.x, path().x))


def test_weights_of_prior_paths_have_mean_one():
    """The mean of exp(log_ratio) over the prior's paths is 1: densities integrate to one."""
    count = 20_000
    near = Network(2)
    with torch.no_grad():
        near.weight.add_(0.05)
    condition = {
        name: value[:1].expand(count, *value.shape[1:]) for name, value in CONDITION.items()
    }
    trajectory = rollout(DIFFUSION, PRIOR, condition, count, generator=seeded())
    with torch.no_grad():
        weight = log_ratio(DIFFUSION, near, PRIOR, trajectory, chunk=10_000).exp()
    assert float(weight.std()) < 2
    assert float(weight.mean()) == pytest.approx(1, abs=4 * float(weight.std()) / count**0.5)


def test_gradient_of_the_log_ratio_never_reaches_the_prior():
    posterior, prior = Network(1), Network(2)
    log_ratio(DIFFUSION, posterior, prior, path()).sum().backward()
    assert posterior.weight.grad is not None
    assert prior.weight.grad is None


def test_ratios_so_far_are_those_of_the_steps_down_to_each_level():
    path, so_far = rollout_step_by_step(
        DIFFUSION, POSTERIOR, PRIOR, CONDITION, BATCH, generator=seeded()
    )
    assert so_far.shape == (path.levels + 1, BATCH) and not so_far[-1].any()
    for k in range(path.levels):
        steps = torch.arange(k + 1, path.levels + 1)[:, None].expand(-1, BATCH)
        wanted = log_ratio(DIFFUSION, POSTERIOR, PRIOR, path, levels=steps)
        torch.testing.assert_close(so_far[k], wanted.detach())
