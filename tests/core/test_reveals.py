"""Laws of revealing positions, enumerated: every subset of a step, every order of a chain."""

import math
from itertools import product

import pytest
import torch
from reveal_laws import LAWS, LENGTH
from torch import Generator, Tensor

from rtb_rl.core import (
    FixedOrder,
    IndependentReveals,
    MaskedDiffusion,
    MaskingSchedule,
    RandomOrder,
    RevealLaw,
    cosine_masking,
    linear_masking,
    rollout,
    rollout_against,
)
from rtb_rl.core.protocols import Condition
from rtb_rl.nn import LearnedReveal


@pytest.fixture(params=LAWS.values(), ids=list(LAWS))
def law(request: pytest.FixtureRequest) -> RevealLaw:
    return request.param


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def subsets() -> Tensor:
    """Every subset of the positions: bool [8, 3]."""
    return torch.tensor(list(product([False, True], repeat=LENGTH)))


def all_times(law: RevealLaw) -> Tensor:
    """Every assignment of a level to each position: [K^3, 3]."""
    return torch.tensor(list(product(range(1, law.levels + 1), repeat=LENGTH)))


def log_prob_of_times(law: RevealLaw, times: Tensor, shift: Tensor | None = None) -> Tensor:
    """The step laws, multiplied along the chain that reveals each position at its time."""
    total = torch.zeros(len(times), dtype=torch.float64)
    for k in range(law.levels, 0, -1):
        rows = torch.full((len(times),), k)
        here = None if shift is None else shift[k].expand(len(times), -1)
        total += law.log_prob(times == k, times <= k, rows, here)
    return total


def index_of(times: Tensor, levels: int) -> Tensor:
    """The row of each in `all_times`."""
    return ((times - 1) * levels ** torch.arange(LENGTH).flip(0)).sum(1)


def assert_frequencies(index: Tensor, probability: Tensor) -> None:
    """Counts within 4.5 standard deviations, and none of what is impossible."""
    count = len(index)
    frequency = torch.bincount(index, minlength=len(probability)) / count
    error = (probability * (1 - probability) / count).sqrt()
    assert bool(((frequency - probability).abs() <= 4.5 * error + 1e-12).all())


def masked_pairs(law: RevealLaw) -> list[tuple[Tensor, int]]:
    """Every (masked set, level) that the chain can meet."""
    times = all_times(law)
    times = times[log_prob_of_times(law, times).isfinite()]
    pairs = [((row <= k).tolist(), k) for row in times for k in range(1, law.levels + 1)]
    return [(torch.tensor(masked), k) for masked, k in {(tuple(m), k) for m, k in pairs}]


@pytest.mark.parametrize("schedule", [linear_masking(6), cosine_masking(5), linear_masking(1)])
def test_reveal_probability_is_the_share_of_masked_tokens_that_a_step_brings_back(schedule):
    rho = schedule.reveal_probability
    for k in range(1, schedule.levels + 1):
        before, after = schedule.kept[k].item(), schedule.kept[k - 1].item()
        assert rho[k].item() == pytest.approx((after - before) / (1 - before), rel=1e-14)
    assert rho[0] == 0 and rho[1] == 1 and len(rho) == schedule.levels + 1
    assert linear_masking(3).reveal_probability.tolist() == pytest.approx([0, 1, 1 / 2, 1 / 3])


def test_cosine_masking_reveals_few_at_first():
    schedule = cosine_masking(4)
    expected = [1 - math.sin(k / 4 * math.pi / 2) for k in range(5)]
    assert schedule.kept.tolist() == pytest.approx(expected, abs=1e-15)
    per_step = -schedule.kept.diff()
    assert bool((per_step.diff() < 0).all())


@pytest.mark.parametrize(
    "kept", [[1.0], [[1.0, 0.0]], [1.0, 0.5], [0.9, 0.0], [1, 0.5, 0.5, 0], [1, math.nan, 0]]
)
def test_a_schedule_must_fall_from_one_to_zero(kept):
    with pytest.raises(ValueError, match=r"levels 0\.\.K|start at 1"):
        MaskingSchedule(torch.tensor(kept, dtype=torch.float64))


def test_a_schedule_is_float64():
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        MaskingSchedule(torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    ("reveals", "left"),
    [
        (IndependentReveals(linear_masking(6), 600), [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
        (RandomOrder(600, per_step=100), [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
        (FixedOrder(range(10), per_step=4), [0.6, 0.2, 0]),
    ],
)
def test_masks_left_after_each_step(reveals, left):
    """A known mistake, dt / (1 - (1 - 1e-3) t), leaves .999 .908 .778 .622 .445 .242 instead."""
    masked = torch.ones(50, reveals.length, dtype=torch.bool)
    for k, expected in zip(range(reveals.levels, 0, -1), left, strict=True):
        level = torch.full((50,), k)
        masked = masked & ~reveals.draw(masked, level, None, generator=seeded(k))
        error = 4.5 * math.sqrt(expected * (1 - expected) / masked.numel())
        assert float(masked.double().mean()) == pytest.approx(expected, abs=error)


def test_step_laws_of_a_chain_sum_to_one_over_all_times(law):
    total = log_prob_of_times(law, all_times(law)).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-12)


def test_times_are_drawn_from_the_chain_of_step_laws(law):
    probability = log_prob_of_times(law, all_times(law)).exp()
    times = law.times(20_000, generator=seeded())
    assert times.dtype == torch.int64 and times.shape == (20_000, LENGTH)
    assert_frequencies(index_of(times, law.levels), probability)


def test_draws_of_a_step_have_the_law_of_log_prob(law):
    every = subsets()
    for masked, k in masked_pairs(law):
        level, count = torch.tensor(k), 3000
        possible = (every <= masked).all(1)
        log_prob = law.log_prob(every, masked.expand(8, -1), level.expand(8), None)
        probability = torch.where(possible, log_prob.exp(), 0.0)
        assert probability.sum().item() == pytest.approx(1, abs=1e-12)
        drawn = law.draw(masked.expand(count, -1), level.expand(count), None, generator=seeded(k))
        assert_frequencies((drawn * torch.tensor([4, 2, 1])).sum(1), probability)
        marginal = (probability[:, None] * every).sum(0)
        given = law.probability(masked[None], level[None])[0]
        torch.testing.assert_close(given, marginal, rtol=1e-12, atol=1e-12)


def test_independent_times_have_the_marginal_of_the_schedule():
    """Each position alone: P(time = k) = kept[k - 1] - kept[k]."""
    for name in ("linear", "cosine"):
        law = LAWS[name]
        times = all_times(law)
        schedule = linear_masking(4) if name == "linear" else cosine_masking(3)
        expected = (-schedule.kept.diff())[times - 1].prod(1)
        torch.testing.assert_close(log_prob_of_times(law, times).exp(), expected)


def test_fixed_order_reveals_in_that_order():
    law = FixedOrder(torch.tensor([2, 0, 4, 1, 3]), per_step=2)
    assert law.levels == 3
    assert law.times(2, generator=seeded()).tolist() == 2 * [[3, 2, 3, 1, 2]]


def test_random_order_draws_every_subset_alike():
    law, masked = RandomOrder(5, per_step=2), torch.tensor([[True, True, False, True, True]])
    pair = torch.tensor([[True, False, False, True, False]])
    level = torch.tensor([2])
    assert law.log_prob(pair, masked, level, None).item() == pytest.approx(-math.log(6))
    one = pair & (torch.arange(5) == 0)
    assert law.log_prob(one, masked, level, None).item() == -math.inf


def test_the_last_step_reveals_all_that_remain(law):
    """Also where more are masked than the chain would have left."""
    masked, level = torch.ones(1, LENGTH, dtype=torch.bool), torch.tensor([1])
    assert bool(law.draw(masked, level, None, generator=seeded()).all())
    assert law.log_prob(masked, masked, level, None).item() == 0


def test_a_shifted_law_is_normalised_and_drawn():
    law = LAWS["linear"]
    shift = torch.randn((law.levels + 1, LENGTH), generator=seeded(), dtype=torch.float64)
    times = all_times(law)
    probability = log_prob_of_times(law, times, shift).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)
    assert float((probability - log_prob_of_times(law, times).exp()).abs().max()) > 0.01
    masked = torch.ones(20_000, LENGTH, dtype=torch.bool)
    drawn = torch.zeros(20_000, LENGTH, dtype=torch.int64)
    for k in range(law.levels, 0, -1):
        level, here = torch.full((20_000,), k), shift[k].expand(20_000, -1)
        revealed = law.draw(masked, level, here, generator=seeded(k))
        drawn[revealed] = k
        masked = masked & ~revealed
    assert_frequencies(index_of(drawn, law.levels), probability)


def test_a_shift_adds_to_the_log_odds_and_does_nothing_at_level_one():
    law, masked = IndependentReveals(linear_masking(3), 1), torch.ones(1, 1, dtype=torch.bool)
    shift = torch.full((1, 1), 0.7, dtype=torch.float64, requires_grad=True)
    at_two = law.log_prob(masked, masked, torch.tensor([2]), shift)
    odds = math.exp(0.7)  # times 1, since rho_2 = 1 / 2
    assert at_two.item() == pytest.approx(math.log(odds / (1 + odds)))
    at_one = law.log_prob(masked, masked, torch.tensor([1]), shift)
    (gradient,) = torch.autograd.grad(at_one.sum(), shift)
    assert at_one.item() == 0 and gradient.item() == 0


def test_a_learned_reveal_starts_as_the_network_and_stays_within_its_limit():
    law = LAWS["linear"]

    def prior(x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        return torch.full((*x.shape, 2), -math.log(2))

    posterior = LearnedReveal(prior, levels=law.levels, length=LENGTH)
    diffusion = MaskedDiffusion(LENGTH, 2, law)
    path, ratio = rollout_against(diffusion, posterior, prior, None, 50, generator=seeded())
    assert torch.equal(ratio, torch.zeros(50))
    assert torch.equal(path.x, rollout(diffusion, prior, None, 50, generator=seeded()).x)
    with torch.no_grad():
        posterior.shift.fill_(100.0)
    shift = posterior(path.x[2], torch.full((50,), 2), None).reveal_shift
    torch.testing.assert_close(shift, torch.full((50, LENGTH), posterior.limit))


@pytest.mark.parametrize("name", ["random_order", "fixed_order"])
def test_an_order_takes_no_shift(name):
    masked, level, shift = torch.ones(1, 3, dtype=torch.bool), torch.tensor([3]), torch.zeros(1, 3)
    for call in (
        lambda: LAWS[name].draw(masked, level, shift, generator=seeded()),
        lambda: LAWS[name].log_prob(masked, masked, level, shift),
    ):
        with pytest.raises(ValueError, match="use IndependentReveals"):
            call()


@pytest.mark.parametrize("order", [[0, 0, 1], [1, 2, 3], [[0, 1]]])
def test_an_order_holds_every_position_once(order):
    with pytest.raises(ValueError, match="once"):
        FixedOrder(order)


@pytest.mark.parametrize(("length", "per_step"), [(0, 1), (3, 0)])
def test_a_chain_reveals_something(length, per_step):
    with pytest.raises(ValueError, match="at least one"):
        RandomOrder(length, per_step)
