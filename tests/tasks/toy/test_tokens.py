import pytest
import torch
from torch import nn

from rtb_rl.core import (
    FixedOrder,
    IndependentReveals,
    MaskedDiffusion,
    RandomOrder,
    RevealPrediction,
    Sampler,
    linear_masking,
    log_ratio,
    noise_back,
    rollout,
)
from rtb_rl.tasks.toy.enumeration import TokenSpace, tilted, total_variation
from rtb_rl.tasks.toy.floors import chain_law, prior_chain
from rtb_rl.tasks.toy.tokens import TabularDenoiser, terminal_law, token_task

ONE_A_STEP = [FixedOrder(torch.tensor([2, 0, 1])), RandomOrder(3)]
SEVERAL = [
    IndependentReveals(linear_masking(4), 3),
    RandomOrder(3, per_step=2),
    FixedOrder(torch.tensor([2, 0, 1]), per_step=2),
]


def task(reveals, seed=0):
    return token_task(3, 3, reveals, generator=torch.Generator().manual_seed(seed))


def rewards_of(toy) -> torch.Tensor:
    return toy.task.log_reward(TokenSpace(3, 3).clean, None)


def test_conditionals_are_those_of_the_law():
    space = TokenSpace(2, 3)
    law = torch.rand(8, generator=torch.Generator().manual_seed(0)).double().softmax(0)
    array = law.reshape(2, 2, 2)
    row = space.conditionals(law)[space.index(torch.tensor([[2, 1, 2]]))][0]
    given = array[:, 1] / array[:, 1].sum()
    torch.testing.assert_close(row[0], given.sum(1))
    torch.testing.assert_close(row[1], torch.tensor([0.0, 1.0]).double())
    torch.testing.assert_close(row[2], given.sum(0))


@pytest.mark.parametrize("reveals", ONE_A_STEP + SEVERAL)
def test_the_terminal_law_is_normalised_and_that_of_the_draws(reveals):
    toy = task(reveals)
    law = terminal_law(toy.task.diffusion, toy.task.prior)
    assert abs(float(law.sum()) - 1) < 1e-13
    draws = Sampler(toy.task.diffusion, toy.task.prior).sample(
        None, 20_000, generator=torch.Generator().manual_seed(1)
    )
    assert total_variation(TokenSpace(3, 3).frequencies(draws), law) < 0.02


@pytest.mark.parametrize("levels", [1, 3])
def test_the_terminal_law_is_that_of_the_transition_matrices(levels):
    toy = task(IndependentReveals(linear_masking(levels), 3))
    tokens = toy.task.prior.logits.softmax(-1)
    expected = chain_law(TokenSpace(3, 3), prior_chain(TokenSpace(3, 3), tokens, levels))
    law = terminal_law(toy.task.diffusion, toy.task.prior)
    torch.testing.assert_close(law, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("reveals", ONE_A_STEP)
def test_with_one_reveal_a_step_the_exact_posterior_is_a_chain(reveals):
    toy = task(reveals)
    diffusion, prior, exact = toy.task.diffusion, toy.task.prior, toy.exact_posterior
    assert exact is not None
    target = tilted(terminal_law(diffusion, prior), rewards_of(toy))
    assert total_variation(terminal_law(diffusion, exact), target) < 1e-12
    generator = torch.Generator().manual_seed(2)
    paths = [
        rollout(diffusion, prior, None, 50, generator=generator),
        noise_back(diffusion, TokenSpace(3, 3).clean, None, generator=generator),
    ]
    for path in paths:
        ratio = log_ratio(diffusion, exact, prior, path)
        residual = toy.log_z(None) + ratio - toy.task.log_reward(path.x0, None)
        assert float(residual.abs().max()) < 1e-12


@pytest.mark.parametrize("reveals", SEVERAL)
def test_with_several_reveals_a_step_no_exact_posterior_is_claimed(reveals):
    assert task(reveals).exact_posterior is None


def test_without_reward_the_exact_posterior_is_the_prior_and_log_z_zero():
    reveals = FixedOrder(torch.arange(3))
    toy = token_task(3, 3, reveals, generator=torch.Generator().manual_seed(0), reward_scale=0.0)
    assert abs(float(toy.log_z(None))) < 1e-14
    assert toy.task.evaluate(Sampler(toy.task.diffusion, toy.task.prior))["tv"] < 1e-14


def test_the_target_is_drawn_and_measured():
    toy = task(RandomOrder(3))
    draws = toy.task.draw_target(None, 20_000, generator=torch.Generator().manual_seed(0))
    assert draws.shape == (20_000, 3)
    assert toy.errors(draws, None)["tv"] < 0.02
    prior_error = toy.task.evaluate(Sampler(toy.task.diffusion, toy.task.prior))["tv"]
    assert prior_error > 0.3
    _, data = toy.task.draw_conditions(20_000, generator=torch.Generator().manual_seed(1))
    assert abs(toy.errors(data, None)["tv"] - prior_error) < 0.02


def test_the_posterior_starts_as_the_prior_exactly_and_learns_the_exact_one():
    toy = task(FixedOrder(torch.arange(3)))
    diffusion, prior, posterior = toy.task.diffusion, toy.task.prior, toy.task.posterior
    path = rollout(diffusion, prior, None, 64, generator=torch.Generator().manual_seed(0))
    assert bool((log_ratio(diffusion, posterior, prior, path) == 0).all())
    log_ratio(diffusion, posterior, prior, path).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in posterior.parameters())
    with torch.no_grad():
        change = toy.exact_posterior.logits - prior.logits
        posterior.correction.copy_(change.nan_to_num(0))
    assert toy.task.evaluate(Sampler(diffusion, posterior))["tv"] < 1e-12


def test_the_terminal_law_follows_a_learned_reveal():
    """Two positions; one always revealed first makes a chain of true conditionals exact."""
    space = TokenSpace(2, 2)
    law = torch.tensor([0.4, 0.1, 0.1, 0.4], dtype=torch.float64)
    denoiser = TabularDenoiser(space, space.conditionals(law).log())
    diffusion = MaskedDiffusion(2, 2, IndependentReveals(linear_masking(2), 2))
    shift = torch.tensor([60.0, -60.0], dtype=torch.float64)

    def ordered(x, level, condition):
        return RevealPrediction(denoiser(x, level, condition), shift.expand(len(x), 2))

    assert total_variation(terminal_law(diffusion, denoiser), law) > 0.05
    assert total_variation(terminal_law(diffusion, ordered), law) < 1e-12


def test_a_posterior_of_ones_own():
    toy = token_task(
        2,
        2,
        RandomOrder(2),
        posterior=lambda prior, diffusion: nn.Sequential(),
        generator=torch.Generator().manual_seed(0),
    )
    assert isinstance(toy.task.posterior, nn.Sequential)
