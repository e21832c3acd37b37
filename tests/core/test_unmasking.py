"""One step of unmasking: precision, impossible tokens, rare tokens, and what is refused."""

import math

import pytest
import torch
from torch import Generator, Tensor

from rtb_rl.core import (
    MaskedDiffusion,
    RandomOrder,
    RevealPrediction,
)
from rtb_rl.core.kernels import exponential_race

LENGTH = 3


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def assert_frequencies(index: Tensor, probability: Tensor) -> None:
    """Counts within 4.5 standard deviations, and none of what is impossible."""
    count = len(index)
    frequency = torch.bincount(index, minlength=len(probability)) / count
    error = (probability * (1 - probability) / count).sqrt()
    assert bool(((frequency - probability).abs() <= 4.5 * error + 1e-12).all())


def test_impossible_tokens_that_are_not_taken_leave_value_and_gradient_finite():
    diffusion = MaskedDiffusion(LENGTH, 3, RandomOrder(LENGTH))
    x, x_before = torch.tensor([[3, 3, 1]]), torch.tensor([[0, 3, 1]])
    x0, level = torch.tensor([[0, 1, 2]]), torch.tensor([2])
    logits = normal(1, LENGTH, 3).requires_grad_()
    never = torch.tensor([False, False, True])
    kernel, same = (
        diffusion.kernel(logits.masked_fill(never, -torch.inf).log_softmax(-1), x, level)
        for _ in range(2)
    )
    other = diffusion.kernel(torch.full((1, LENGTH, 3), 1 / 3).log(), x, level)
    assert kernel.log_ratio(same, x_before).item() == 0
    for value in (
        kernel.log_prob(x_before),
        kernel.log_ratio(other, x_before),
        diffusion.denoising_loss(kernel.log_probs, x0, x, level),
    ):
        (gradient,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        assert bool(value.isfinite()) and bool(gradient.isfinite().all()) and bool(gradient.any())


@pytest.mark.parametrize(
    "x_before",
    [[0, 3, 2], [3, 3, 1], [0, 0, 1], [2, 3, 1]],
    ids=["clean token changed", "nothing revealed", "too much revealed", "impossible token"],
)
def test_what_can_not_follow_has_no_probability(x_before):
    diffusion = MaskedDiffusion(LENGTH, 3, RandomOrder(LENGTH))
    log_probs = torch.tensor([0.5, 0.5, 0.0]).log().expand(1, LENGTH, -1)
    kernel = diffusion.kernel(log_probs, torch.tensor([[3, 3, 1]]), torch.tensor([2]))
    assert kernel.log_prob(torch.tensor([x_before])).item() == -math.inf
    assert kernel.log_prob(torch.tensor([[0, 3, 1]])).item() == pytest.approx(-2 * math.log(2))


def test_half_precision_predictions_are_scored_in_float32():
    diffusion, x = MaskedDiffusion(LENGTH, 2, RandomOrder(LENGTH)), torch.full((4, LENGTH), 2)
    level = torch.full((4,), LENGTH)
    log_probs = normal(4, LENGTH, 2).log_softmax(-1).half()
    kernel = diffusion.kernel(log_probs, x, level)
    x_before = kernel.sample(generator=seeded())
    exact = diffusion.kernel(log_probs.double(), x, level).log_prob(x_before)
    assert kernel.log_prob(x_before).dtype == kernel.log_ratio(kernel, x_before).dtype
    assert kernel.log_prob(x_before).dtype == torch.float32
    torch.testing.assert_close(kernel.log_prob(x_before).double(), exact)


def test_widened_by_a_factor_is_a_higher_temperature():
    diffusion, x = MaskedDiffusion(LENGTH, 3, RandomOrder(LENGTH)), torch.full((1, LENGTH), 3)
    kernel = diffusion.kernel(normal(1, LENGTH, 3).log_softmax(-1), x, torch.tensor([3]))
    root = kernel.log_probs.exp().sqrt()
    torch.testing.assert_close(kernel.widened(2).log_probs.exp(), root / root.sum(-1, keepdim=True))
    torch.testing.assert_close(kernel.widened(1).log_probs, kernel.log_probs)


def test_the_race_draws_a_token_as_often_as_it_is_likely():
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0], dtype=torch.float64)
    drawn = exponential_race(probability.log().expand(40_000, -1), generator=seeded())
    assert_frequencies(drawn, probability)


def test_the_race_is_right_for_a_token_of_probability_1e_9(monkeypatch):
    """Only uniforms below 1e-8 let it win, so those alone are drawn for it; then it must win with
    probability E min(1, E / 10) = 0.1 (1 - exp(-10)), E the arrival of the other.
    """
    dtypes, rand = [], torch.rand

    def rare(shape: torch.Size, **options) -> Tensor:
        dtypes.append(options["dtype"])
        return rand(shape, **options) * torch.tensor([1.0, 1e-8], dtype=torch.float64)

    monkeypatch.setattr(torch, "rand", rare)
    log_probs = torch.tensor([1 - 1e-9, 1e-9], dtype=torch.float64).log().float()
    drawn = exponential_race(log_probs.expand(100_000, -1), generator=seeded())
    assert dtypes == [torch.float64]  # float32 has no uniform between 0 and 6e-8
    expected = 0.1 * (1 - math.exp(-10))
    assert_frequencies(drawn, torch.tensor([1 - expected, expected], dtype=torch.float64))


DIFFUSION = MaskedDiffusion(LENGTH, 2, RandomOrder(LENGTH))
X, LEVEL, UNIFORM = torch.full((2, 3), 2), torch.tensor([3, 3]), torch.full((2, 3, 2), -math.log(2))
CLEAN = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DIFFUSION.kernel(UNIFORM[:, :2], X, LEVEL), r"\[2, 2, 2\] don't fit tokens"),
        (lambda: DIFFUSION.kernel(UNIFORM.long(), X, LEVEL), r"torch.int64 \[2, 3, 2\]"),
        (lambda: DIFFUSION.kernel(UNIFORM, X.float(), LEVEL), r"int64 \[batch, 3\], not .*float32"),
        (lambda: DIFFUSION.kernel(RevealPrediction(UNIFORM, UNIFORM), X, LEVEL), "one number a"),
        (lambda: DIFFUSION.denoising_loss(UNIFORM, CLEAN[:, :2], X, LEVEL), r"not .*\[2, 2\]"),
        (lambda: DIFFUSION.denoising_loss(UNIFORM[:, :2], CLEAN, X, LEVEL), "don't fit"),
        (lambda: DIFFUSION.corrupt(CLEAN.float(), LEVEL, generator=seeded()), "convert ids"),
        (lambda: DIFFUSION.corrupt(X, LEVEL, generator=seeded()), "holds token 2, the mask, 6"),
        (lambda: DIFFUSION.noise_path(X, generator=seeded()), "holds token 2, the mask"),
        (lambda: MaskedDiffusion(4, 2, RandomOrder(3)), "for 3 positions.* has 4"),
    ],
)
def test_errors_name_both_sides(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_prediction_that_draws_the_mask_is_refused():
    log_probs = torch.full((2, 3, 3), -math.inf)
    log_probs[..., 2] = 0
    with pytest.raises(ValueError, match="TokenLogits"):
        DIFFUSION.kernel(log_probs, X, LEVEL).sample(generator=seeded())


def test_chains_start_all_masked():
    assert DIFFUSION.start(2, generator=seeded()).tolist() == [[2, 2, 2]] * 2
    assert DIFFUSION.signal_left == 0
