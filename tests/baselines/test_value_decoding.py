"""Soft value-based decoding against its exact law, summed over all tuples of candidates."""

import math
from itertools import pairwise, product

import pytest
import torch
from affine_chain import DIFFUSION, LEVELS, LINEAR, ONE, PRIOR, ZERO, tilted
from torch import Generator, Tensor

from rtb_rl.baselines.steering import drawn_tokens
from rtb_rl.baselines.value_decoding import svdd
from rtb_rl.core import (
    FixedOrder,
    GaussianDiffusion,
    IndependentReveals,
    MaskedDiffusion,
    OnDemand,
    RevealPrediction,
    Schedule,
    linear_masking,
)
from rtb_rl.errors import InputError
from rtb_rl.tasks.toy import TabularDenoiser, TokenSpace, terminal_law, token_task, total_variation
from rtb_rl.tasks.toy.enumeration import tilted as tilted_law


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def kept_law(law: Tensor, value: Tensor, candidates: int, temperature: float) -> Tensor:
    """The law of the candidate that is kept of independent draws from `law` [V]: [V].

    Of each tuple of candidates its probability, shared out by softmax(value / temperature).
    """
    kept = torch.zeros_like(law)
    for each in map(list, product(range(len(law)), repeat=candidates)):
        if temperature == 0:
            share = torch.zeros(candidates).double()
            share[value[each].argmax()] = 1
        else:
            share = (value[each] / temperature).softmax(0)
        kept.index_add_(0, torch.tensor(each), law[each].prod() * share)
    return kept


def has_law(counts: Tensor, law: Tensor) -> bool:
    """Whether counts [cells] pass a chi-square test at four standard deviations."""
    expected = float(counts.sum()) * law
    often = expected > 5
    chi_square = float(((counts - expected).square() / expected.clamp(min=1e-9))[often].sum())
    cells = int(often.sum())
    return chi_square < cells + 4 * math.sqrt(2 * cells)


def itself(prediction, x: Tensor, *, generator: Generator) -> Tensor:
    """For a reward that knows the value of a noisy point."""
    return x.unsqueeze(0)


class Tokens:
    """Sequences in a fixed order with a reward that is also known of a sequence with masks: there
    it is the exact value log E[r^sharpness | x].
    """

    def __init__(
        self, vocabulary: int, length: int, *, sharpness: float = 1.0, coupling: float = 0.7
    ):
        self.space = TokenSpace(vocabulary, length)
        order, generator = FixedOrder(torch.arange(length)), seeded()
        self.diffusion = MaskedDiffusion(length, vocabulary, order)
        logits = torch.randn(len(self.space.clean), generator=generator, dtype=torch.float64)
        self.law = (coupling * logits).softmax(0)
        self.log_reward = sharpness * self.space.coupled_logits(generator=generator)
        sequences, masked = self.space.sequences, self.space.masked
        agrees = ((sequences[:, None] == self.space.clean) | masked[:, None]).all(-1)
        weight = agrees.double() * self.law
        self.value = ((weight @ self.log_reward.exp()) / weight.sum(1)).log()
        self.prior = TabularDenoiser(self.space, self.space.conditionals(self.law).log())
        self.target = tilted_law(self.law, self.log_reward)

    def draw(self, n: int, condition: Tensor | None = None, **settings) -> Tensor:
        """Draws [n, length], their values exact."""
        return svdd(
            self.diffusion,
            self.prior,
            lambda x, condition: self.value[self.space.index(x)],
            condition,
            n,
            **{"generator": seeded(1), "clean": itself} | settings,
        ).x0

    def error(self, x0: Tensor) -> float:
        """Total variation of draws to the target."""
        return total_variation(self.space.frequencies(x0), self.target)

    def exact(self, candidates: int, temperature: float) -> Tensor:
        """The law of a decoded sequence, position after position: [V^length]."""
        size, mask = self.space.vocabulary, self.space.vocabulary
        found = {(): 1.0}
        for position in range(self.space.length):
            longer = {}
            for prefix, probability in found.items():
                rest = [mask] * (self.space.length - position - 1)
                x = torch.tensor([[*prefix, mask, *rest]])
                after = torch.tensor([[*prefix, token, *rest] for token in range(size)])
                law = self.prior(x, torch.ones(1), None)[0, position].exp()
                value = self.value[self.space.index(after)]
                kept = kept_law(law, value, candidates, temperature)
                for token in range(size):
                    longer[(*prefix, token)] = probability * float(kept[token])
            found = longer
        return torch.tensor(list(found.values()), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("candidates", [1, 2, 3])
def test_one_step_resamples_the_candidates_by_their_rewards(candidates, temperature):
    """At temperature 1 self-normalised importance resampling of so many draws."""
    tokens = Tokens(3, 1)
    x0 = tokens.draw(40_000, candidates=candidates, temperature=temperature)
    exact = kept_law(tokens.law, tokens.log_reward, candidates, temperature)
    assert has_law(x0[:, 0].bincount(minlength=3), exact)
    if candidates > 1:
        assert not has_law(x0[:, 0].bincount(minlength=3), tokens.law)


@pytest.mark.parametrize(("candidates", "temperature"), [(2, 1.0), (3, 0.5), (4, 0.0)])
def test_a_chain_of_steps_has_its_exact_law(candidates, temperature):
    tokens = Tokens(3, 3)
    x0 = tokens.draw(40_000, candidates=candidates, temperature=temperature)
    counts = tokens.space.clean_rows(x0).bincount(minlength=27)
    assert has_law(counts, tokens.exact(candidates, temperature))
    assert not has_law(counts, tokens.law) and not has_law(counts, tokens.target)


def test_with_many_candidates_and_exact_values_the_law_is_the_target():
    tokens = Tokens(2, 3, sharpness=2.0)
    exact = [total_variation(tokens.exact(m, 1.0), tokens.target) for m in (1, 2, 4, 8)]
    assert all(later < 0.8 * earlier for earlier, later in pairwise(exact))
    found = [tokens.error(tokens.draw(20_000, candidates=m)) for m in (1, 8, 100)]
    assert found[0] > 0.4 and found[1] == pytest.approx(exact[-1], abs=0.01)
    assert found[2] < 0.012


def test_of_several_points_the_mean_of_r_counts():
    """All tokens of the one masked position, under a uniform prior: the exact value again."""
    tokens = Tokens(3, 2, sharpness=3.0, coupling=0.0)

    def filled(prediction, x, *, generator):
        return torch.stack([torch.where(x == 3, token, x) for token in range(3)])

    x0 = tokens.draw(40_000, candidates=3, clean=filled)
    assert has_law(tokens.space.clean_rows(x0).bincount(minlength=9), tokens.exact(3, 1.0))


def test_one_candidate_is_the_prior():
    tokens = Tokens(3, 2)
    x0 = tokens.draw(40_000, candidates=1)
    assert has_law(tokens.space.clean_rows(x0).bincount(minlength=9), tokens.law)
    assert tokens.error(x0) > 0.1


def test_temperature_zero_with_many_candidates_finds_the_best_sequence():
    """Sharp values, log E[r^60 | x], lead to it."""
    tokens = Tokens(3, 3, sharpness=60.0)
    best = tokens.space.clean[tokens.log_reward.argmax()]
    assert float(tokens.law[tokens.log_reward.argmax()]) < 0.2
    x0 = tokens.draw(200, candidates=400, temperature=0.0)
    assert bool((x0 == best).all())


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_the_predicted_mean_is_the_value_of_a_linear_reward(beta):
    """Up to a constant: so Gaussian draws tend to prior * r^beta, here N(1 + beta 1.5 / 4, 1/4)."""
    means = {}
    for candidates in (1, 4, 100):
        draws = svdd(
            DIFFUSION,
            PRIOR,
            lambda x0, condition: LINEAR(x0),
            None,
            8000,
            beta=beta,
            candidates=candidates,
            generator=seeded(),
        )
        means[candidates] = float(draws.x0.mean())
    exact, _ = tilted(LINEAR).final(ZERO, ONE)
    assert float(exact) == pytest.approx(1.375)
    error = 4 * 0.5 / math.sqrt(8000)
    assert means[1] == pytest.approx(1, abs=error)
    assert means[1] + 0.05 < means[4]
    assert means[100] == pytest.approx(1 + beta * 0.375, abs=error)


def test_drawn_tokens_estimate_the_value_where_several_are_masked():
    reveals = IndependentReveals(linear_masking(3), 3)
    toy = token_task(3, 3, reveals, generator=seeded(), reward_scale=1.0)
    task = toy.task

    def errors(**settings) -> float:
        draws = svdd(
            task.diffusion,
            task.prior,
            task.log_reward,
            None,
            6000,
            clean=drawn_tokens(mask=3, draws=8),
            generator=seeded(),
            **settings,
        )
        return toy.errors(draws.x0, None)["tv"]

    prior, decoded = errors(candidates=1), errors(candidates=20)
    assert prior > 0.2 and decoded < 0.05


def test_a_reveal_shift_is_followed():
    """A shift that reveals the first position early and the second late, both free otherwise."""
    tokens = Tokens(2, 2, sharpness=2.0)
    diffusion = MaskedDiffusion(2, 2, IndependentReveals(linear_masking(2), 2))

    def shifted(strength: float):
        shift = strength * torch.tensor([1.0, -1.0], dtype=torch.float64)
        return lambda x, level, condition: RevealPrediction(
            tokens.prior(x, level, condition), shift.expand(len(x), -1)
        )

    def draw(denoiser, seen: list):
        def clean(prediction, x, *, generator):
            seen.append(x)
            return torch.where(x == 2, 0, x).unsqueeze(0)

        rewards = tokens.log_reward
        return svdd(
            diffusion,
            denoiser,
            lambda x0, condition: rewards[tokens.space.clean_rows(x0)],
            None,
            50,
            candidates=4,
            clean=clean,
            generator=seeded(),
        ).x0

    plain, free, early = [], [], []
    assert torch.equal(draw(tokens.prior, plain), draw(shifted(0.0), free))
    draw(shifted(50.0), early)
    assert torch.equal(plain[0], free[0]) and 0 < int((plain[0][:, 0] == 2).sum()) < 200
    assert bool((early[0][:, 0] < 2).all()) and bool((early[0][:, 1] == 2).all())


def gaussian(condition, n: int, log_reward=lambda x0, condition: LINEAR(x0), **settings):
    return svdd(DIFFUSION, PRIOR, log_reward, condition, n, **{"generator": seeded()} | settings)


def test_calls_are_counted_for_each_draw():
    """The prediction at a kept candidate serves the next step; clean candidates need none."""
    for batch in (4096, 7, 1):
        draws = gaussian(torch.zeros(3, 1), 5, candidates=4, batch=batch)
        assert draws.calls == 4 * (LEVELS - 1) + 1
        assert draws.x0.shape == (3, 5, 1)
    assert gaussian(None, 5, candidates=1).calls == LEVELS
    one = GaussianDiffusion(Schedule(torch.tensor([1.0, 0.0])), (1,), torch.ones(1))
    draws = svdd(
        one,
        lambda x, level, condition: torch.zeros_like(x),
        lambda x0, condition: x0[:, 0],
        None,
        6,
        generator=seeded(),
    )
    assert draws.calls == 1 and draws.x0.shape == (6, 1)


def test_each_row_is_decoded_for_its_own_condition():
    def towards(x0, condition):
        return -20 * (x0 - condition).square().sum(1)

    rows = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    draws = gaussian(rows, 400, towards, candidates=50, batch=999)
    assert draws.x0.shape == (3, 400, 1)
    exact = (4 + 40 * rows[:, 0]) / 44  # N(1, 1/4) with precision 40 more
    assert bool(((draws.x0.mean(1)[:, 0] - exact).abs() < 0.12).all())
    other = gaussian(rows * torch.tensor([[1.0], [1.0], [9.0]]), 400, towards, candidates=50)
    same = gaussian(rows, 400, towards, candidates=50)
    assert torch.equal(other.x0[:2], same.x0[:2]) and not torch.equal(other.x0[2], same.x0[2])


def test_impossible_candidates_are_not_kept():
    """log r = -inf below one: half of the prior's draws."""

    def above_one(x0, condition):
        return torch.where(x0[:, 0] > 1.0, 0.0, -torch.inf)

    draws = gaussian(None, 500, above_one, candidates=30)
    assert bool((draws.x0 > 1).all())
    assert not bool((gaussian(None, 500, above_one, candidates=1).x0 > 1).all())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"candidates": 0}, "candidates is 0; give 1 or more"),
        ({"batch": 0}, "batch is 0; give 1 or more"),
        ({"temperature": -1.0}, "temperature is -1.0; give a positive number, or 0"),
        ({"temperature": math.nan}, "temperature is nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        gaussian(None, 4, **settings)


def test_what_has_no_value_is_refused():
    with pytest.raises(InputError, match=r"log_reward returned \(40, 1\) for 40 points"):
        gaussian(None, 4, lambda x0, condition: x0)
    tokens = Tokens(2, 2)
    with pytest.raises(InputError, match=r"pass clean=drawn_tokens\(mask\)"):
        svdd(tokens.diffusion, tokens.prior, lambda x0, c: x0[:, 0], None, 4, generator=seeded())
    tokens.prior = OnDemand(tokens.prior)
    with pytest.raises(InputError, match="pass the denoiser that OnDemand wraps"):
        tokens.draw(4)


def test_the_exact_law_of_one_candidate_is_the_chains():
    """Of the enumeration above itself."""
    tokens = Tokens(2, 3)
    chain = terminal_law(tokens.diffusion, tokens.prior)
    torch.testing.assert_close(tokens.exact(1, 1.0), chain)
    torch.testing.assert_close(chain, tokens.law)
