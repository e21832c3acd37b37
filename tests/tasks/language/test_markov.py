"""The closed forms of a Markov chain against brute force over all infillings."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Generator, Tensor

from rtb_rl.errors import InputError
from rtb_rl.tasks.language.markov import MarkovChain, random_chain, stationary_law

VOCABULARY, LENGTH = 3, 3


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


CHAIN = random_chain(VOCABULARY, generator=seeded())
ALL = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * LENGTH)
LEFT = torch.tensor([0, 1, 2, 2])
RIGHT = torch.tensor([[0, 1], [2, 2], [1, 0], [0, 0]])


def by_hand(tokens: list[int]) -> float:
    """log p of all tokens after the first, one step after the other."""
    return sum(math.log(float(CHAIN.transition[a, b])) for a, b in pairwise(tokens))


def joint() -> Tensor:
    """log p(z, y | x) of every problem and infilling: [4, V^L]."""
    rows = [
        [by_hand([x, *z, *y]) for z in ALL.tolist()]
        for x, y in zip(LEFT.tolist(), RIGHT.tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def exactly(found: Tensor, expected: Tensor) -> bool:
    """Both in float64 and equal to rounding."""
    same = torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    return found.dtype == torch.float64 and found.shape == expected.shape and same


def test_prior_and_reward_are_those_of_the_steps():
    z = ALL[[5, 11, 20, 26]]
    prior, reward = CHAIN.prior_log_prob(LEFT, z), CHAIN.log_reward(z, RIGHT)
    for row, (x, middle, y) in enumerate(zip(LEFT.tolist(), z.tolist(), RIGHT.tolist())):
        assert float(prior[row]) == pytest.approx(by_hand([x, *middle]), abs=1e-12)
        assert float(reward[row]) == pytest.approx(by_hand([middle[-1], *y]), abs=1e-12)
    assert exactly(prior + reward, joint()[torch.arange(4), torch.tensor([5, 11, 20, 26])])


def test_log_z_is_the_sum_over_all_infillings():
    assert exactly(CHAIN.log_z(LEFT, RIGHT, LENGTH), joint().logsumexp(1))


def test_the_priors_of_all_infillings_sum_to_one():
    for x in range(VOCABULARY):
        prior = CHAIN.prior_log_prob(torch.full((len(ALL),), x), ALL)
        assert float(prior.exp().sum()) == pytest.approx(1, abs=1e-12)


def test_marginals_are_those_of_the_enumerated_posterior():
    posterior = joint().softmax(1)
    tokens = torch.nn.functional.one_hot(ALL, VOCABULARY).double()
    expected = torch.einsum("bs,slv->blv", posterior, tokens)
    found = CHAIN.marginals(LEFT, RIGHT, LENGTH)
    assert exactly(found, expected)
    prior = torch.linalg.matrix_power(CHAIN.transition, LENGTH)[LEFT]
    assert float((found[:, -1] - prior).abs().sum(1).max()) > 0.1  # the reward matters


def test_what_comes_after_the_first_token_of_the_right_context_changes_log_z_alone():
    right = RIGHT.clone()
    right[:, 1] = (right[:, 1] + 1) % VOCABULARY
    assert exactly(CHAIN.marginals(LEFT, right, LENGTH), CHAIN.marginals(LEFT, RIGHT, LENGTH))
    steps = CHAIN.transition[RIGHT[:, 0]].log()
    gain = (steps.gather(1, right[:, 1:]) - steps.gather(1, RIGHT[:, 1:]))[:, 0]
    assert exactly(CHAIN.log_z(LEFT, right, LENGTH) - CHAIN.log_z(LEFT, RIGHT, LENGTH), gain)


def test_posterior_draws_have_the_enumerated_law():
    """Chi-square of the counts of whole infillings, not of their marginals alone."""
    n = 20_000
    draws = CHAIN.draw_posterior(LEFT, RIGHT, LENGTH, n, generator=seeded(1))
    assert draws.shape == (4, n, LENGTH) and draws.dtype == torch.int64
    posterior = joint().softmax(1)
    place = (draws * torch.tensor([9, 3, 1])).sum(-1)
    for row in range(4):
        expected = n * posterior[row]
        counts = place[row].bincount(minlength=len(ALL)).double()
        often = expected > 5
        chi_square = ((counts - expected).square() / expected)[often].sum()
        cells = int(often.sum())
        assert float(chi_square) < cells + 4 * math.sqrt(2 * cells)
        shares = torch.nn.functional.one_hot(draws[row], VOCABULARY).double().mean(0)
        exact = CHAIN.marginals(LEFT[row : row + 1], RIGHT[row : row + 1], LENGTH)[0]
        assert float((shares - exact).abs().max()) < 4 * 0.5 / math.sqrt(n)


def test_longer_gaps_are_gaps_of_gaps():
    """Chapman-Kolmogorov: p(y | x) over 7 positions, by the token at the third of them."""
    x, y = torch.tensor([1]), torch.tensor([[2]])
    middle = torch.arange(VOCABULARY)
    before = CHAIN.log_z(x.expand(VOCABULARY), middle[:, None], 2)
    after = CHAIN.log_z(middle, y.expand(VOCABULARY, 1), 4)
    assert exactly((before + after).logsumexp(0, keepdim=True), CHAIN.log_z(x, y, 7))
    assert exactly((before + after).softmax(0), CHAIN.marginals(x, y, 7)[0, 2])


def test_far_away_a_context_is_forgotten():
    chain = random_chain(generator=seeded())
    left = torch.tensor([0, 7, 19])
    right = torch.tensor([[3], [3], [11]])
    assert exactly(chain.log_z(left, right, 200), chain.initial[right[:, 0]].log())
    middle = chain.marginals(left, right, 201)[:, 100]
    assert exactly(middle, chain.initial.expand(3, -1))


def test_the_initial_law_is_stationary_and_sequences_have_the_laws_of_the_chain():
    chain = random_chain(6, generator=seeded(2))
    assert exactly(chain.initial @ chain.transition, chain.initial)
    n = 20_000
    tokens = chain.sample(n, 5, generator=seeded(3))
    assert tokens.shape == (n, 5) and tokens.dtype == torch.int64
    for position in (0, 4):
        shares = tokens[:, position].bincount(minlength=6).double() / n
        assert float((shares - chain.initial).abs().max()) < 4 * 0.5 / math.sqrt(n)
    pairs = (tokens[:, 2] * 6 + tokens[:, 3]).bincount(minlength=36).double() / n
    expected = (chain.initial[:, None] * chain.transition).flatten()
    assert float((pairs - expected).abs().max()) < 4 * 0.5 / math.sqrt(n)


def test_a_first_law_of_its_own_is_that_of_the_first_token():
    chain = MarkovChain(torch.tensor([0.0, 1.0, 0.0]).double(), CHAIN.transition)
    tokens = chain.sample(20_000, 2, generator=seeded())
    assert bool((tokens[:, 0] == 1).all())
    shares = tokens[:, 1].bincount(minlength=3).double() / len(tokens)
    assert float((shares - CHAIN.transition[1]).abs().max()) < 0.015


def test_concentration_says_how_certain_the_next_token_is():
    def perplexity(concentration: float) -> float:
        chain = random_chain(concentration=concentration, generator=seeded())
        entropy = -(chain.transition * chain.transition.log()).sum(1)
        return float((chain.initial @ entropy).exp())

    assert perplexity(0.1) < 2 < 4 < perplexity(0.5) < 8 < 18 < perplexity(5.0) < 20


def test_steps_that_never_happen():
    """0 -> 1 -> 2 -> 0 with certainty: one infilling, and right contexts that can't be."""
    circle = torch.eye(3, dtype=torch.float64).roll(1, 1)
    chain = MarkovChain(stationary_law(circle), circle)
    left, right = torch.tensor([0]), torch.tensor([[0, 1]])
    assert float(chain.log_z(left, right, 2)) == 0
    assert chain.marginals(left, right, 2).argmax(-1).tolist() == [[1, 2]]
    drawn = chain.draw_posterior(left, right, 2, 3, generator=seeded())
    assert drawn.tolist() == [[[1, 2]] * 3]
    assert float(chain.log_z(left, right, 3)) == -torch.inf
    for method in (chain.marginals, chain.draw_posterior):
        more = {} if method == chain.marginals else {"n": 1, "generator": seeded()}
        with pytest.raises(InputError, match=r"context \[0, 1\] of row 0 can't follow token 0"):
            method(left, right, 3, **more)
        with pytest.raises(InputError, match="0 free positions"):
            method(left, right, 0, **more)


@pytest.mark.parametrize(
    ("initial", "transition", "words"),
    [
        ([0.5, 0.5], [[1.0, 0.0]], r"\[2\] and transitions \[1, 2\] make no chain"),
        ([0.5, 0.4], [[1.0, 0.0], [0.5, 0.5]], "initial is no law: .* sum 0.1 off 1"),
        ([0.5, 0.5], [[1.0, 0.0], [1.5, -0.5]], "transition is no law: its smallest number is"),
    ],
)
def test_what_is_no_chain_is_refused(initial, transition, words):
    with pytest.raises(InputError, match=words):
        MarkovChain(torch.tensor(initial).double(), torch.tensor(transition).double())


def test_float32_and_no_concentration_are_refused():
    with pytest.raises(InputError, match="initial is torch.float32, not float64"):
        MarkovChain(torch.tensor([1.0]), torch.tensor([[1.0]]).double())
    with pytest.raises(InputError, match="concentration is 0"):
        random_chain(concentration=0, generator=seeded())
