"""Masked diffusion against enumeration: every sequence, every path."""

import math
from itertools import product

import pytest
import torch
from reveal_laws import LAWS as REVEAL_LAWS
from reveal_laws import LENGTH
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    Denoiser,
    FixedOrder,
    MaskedDiffusion,
    OnDemand,
    RevealLaw,
    Sampler,
    Trajectory,
    backward_in_chunks,
    log_ratio,
    noise_back,
    rollout,
    rollout_against,
)
from rtb_rl.core.protocols import Condition
from rtb_rl.nn import LearnedReveal

LAWS = {name: law for name, law in REVEAL_LAWS.items() if name != "one_step"}


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def sequences(symbols: int) -> Tensor:
    """Every sequence of these symbols, in the order of `index_of`."""
    return torch.tensor(list(product(range(symbols), repeat=LENGTH)))


def index_of(x: Tensor, symbols: int) -> Tensor:
    return (x * symbols ** torch.arange(x.shape[-1]).flip(0)).sum(-1)


class Table(nn.Module):
    """Free log-probabilities for every noisy sequence: no two of them agree with each other."""

    def __init__(self, vocabulary: int, seed: int = 0):
        super().__init__()
        self.symbols = vocabulary + 1
        rows = self.symbols**LENGTH
        self.logits = nn.Parameter(normal(rows, LENGTH, vocabulary, seed=seed))

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        return self.logits[index_of(x, self.symbols)].log_softmax(-1)


def diffusion_of(law: RevealLaw, vocabulary: int = 2) -> MaskedDiffusion:
    return MaskedDiffusion(LENGTH, vocabulary, law)


def shifted_table(levels: int) -> LearnedReveal:
    network = LearnedReveal(Table(2, 1), levels=levels, length=LENGTH)
    network.shift = nn.Parameter(normal(levels + 1, LENGTH, seed=11))
    return network


def step_matrix(diffusion: MaskedDiffusion, denoiser: Denoiser, level: int) -> Tensor:
    """p(x[level - 1] | x[level]) for all pairs of sequences, from log_prob."""
    every = sequences(diffusion.mask + 1)
    count = len(every)
    x, x_before = every.repeat_interleave(count, 0), every.repeat(count, 1)
    rows = torch.full((count * count,), level)
    kernel = diffusion.kernel(denoiser(x, rows, None), x, rows)
    return kernel.log_prob(x_before).detach().exp().reshape(count, count)


def final_law(diffusion: MaskedDiffusion, denoiser: Denoiser) -> Tensor:
    """The law of x[0], a product of step matrices."""
    every = sequences(diffusion.mask + 1)
    law = (every == diffusion.mask).all(1).double()
    for level in range(diffusion.levels, 0, -1):
        law = law @ step_matrix(diffusion, denoiser, level)
    return law


def all_paths(diffusion: MaskedDiffusion, x0: Tensor) -> Trajectory:
    """Every path that ends in x0 [count, length]: [K + 1, K^length * count, length]."""
    times = torch.tensor(list(product(range(1, diffusion.levels + 1), repeat=LENGTH)))
    x0 = x0.repeat(len(times), 1)
    times = times.repeat_interleave(len(x0) // len(times), 0)
    levels = torch.arange(diffusion.levels + 1)[:, None, None]
    return Trajectory(torch.where(times <= levels, diffusion.mask, x0))


def path_log_prob(diffusion: MaskedDiffusion, denoiser: Denoiser, path: Trajectory) -> Tensor:
    total = torch.zeros(path.x.shape[1], dtype=torch.float64)
    for k in range(diffusion.levels, 0, -1):
        rows = torch.full((len(total),), k)
        kernel = diffusion.kernel(denoiser(path.x[k], rows, None), path.x[k], rows)
        total = total + kernel.log_prob(path.x[k - 1])
    return total


def certain_of(x0: Tensor) -> Denoiser:
    """Predicts x0 whatever it sees: its chain has the law of the reveals alone."""
    log_probs = nn.functional.one_hot(x0, 2).double().log()
    return lambda x, level, condition: log_probs.expand(len(x), -1, -1)


def assert_frequencies(index: Tensor, probability: Tensor) -> None:
    """Counts within 4.5 standard deviations, and none of what is impossible."""
    count = len(index)
    frequency = torch.bincount(index, minlength=len(probability)) / count
    error = (probability * (1 - probability) / count).sqrt()
    assert bool(((frequency - probability).abs() <= 4.5 * error + 1e-12).all())


@pytest.fixture(params=LAWS.values(), ids=list(LAWS))
def law(request: pytest.FixtureRequest) -> RevealLaw:
    return request.param


@pytest.mark.parametrize("vocabulary", [2, 3])
def test_rows_of_every_step_matrix_sum_to_one(law, vocabulary):
    diffusion, every = diffusion_of(law, vocabulary), sequences(vocabulary + 1)
    for level in range(1, law.levels + 1):
        matrix = step_matrix(diffusion, Table(vocabulary), level)
        torch.testing.assert_close(matrix.sum(1), torch.ones(len(every)).double())
        kept = every[:, None] == every[None]
        masked = (every == diffusion.mask)[:, None]
        assert not bool(matrix[~(kept | masked).all(-1)].any())  # a clean token stays


def test_rows_sum_to_one_under_a_shift():
    diffusion = diffusion_of(LAWS["linear"])
    for level in range(1, diffusion.levels + 1):
        rows = step_matrix(diffusion, shifted_table(diffusion.levels), level).sum(1)
        torch.testing.assert_close(rows, torch.ones(len(rows)).double())


def test_samples_have_the_frequencies_of_the_step_matrix(law):
    diffusion, every, count = diffusion_of(law), sequences(3), 4000
    for level, row in ((1, 26), (law.levels, 26), (law.levels, 8)):  # all mask; one token clean
        x, rows = every[row].expand(count, -1), torch.full((count,), level)
        kernel = diffusion.kernel(Table(2)(x, rows, None), x, rows)
        drawn = index_of(kernel.sample(generator=seeded(level)), 3)
        assert_frequencies(drawn, step_matrix(diffusion, Table(2), level)[row])


def test_final_points_of_rollouts_and_samplers_have_the_enumerated_law(law):
    diffusion, count = diffusion_of(law), 5000
    expected = final_law(diffusion, Table(2))
    assert expected.sum().item() == pytest.approx(1)
    path = rollout(diffusion, Table(2), None, count, generator=seeded())
    assert_frequencies(index_of(path.x0, 3), expected)
    sample = Sampler(diffusion, Table(2)).sample(None, count, generator=seeded())
    assert torch.equal(sample, path.x0)
    grouped = Sampler(diffusion, Table(2)).sample(torch.zeros(2), 4, generator=seeded())
    assert grouped.shape == (2, 4, LENGTH)


def test_paths_of_all_points_have_total_probability_one(law):
    diffusion = diffusion_of(law)
    total = path_log_prob(diffusion, Table(2), all_paths(diffusion, sequences(2))).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-12)


def test_noised_paths_have_the_law_of_the_reveals(law):
    """Frequencies of the noised paths of one point against the chain that is certain of it."""
    diffusion, x0 = diffusion_of(law), torch.tensor([[1, 0, 1]])
    every = all_paths(diffusion, x0)
    probability = path_log_prob(diffusion, certain_of(x0), every).exp()
    path = noise_back(diffusion, x0.expand(8000, -1), None, generator=seeded())
    times = (path.x != diffusion.mask).sum(0)  # levels 0..time - 1 are clean
    assert_frequencies(index_of(times - 1, diffusion.levels), probability)
    x = diffusion.corrupt(x0.expand(8000, -1), torch.full((8000,), 1), generator=seeded(1))
    share = (times == 1).double().mean(0)
    error = 4.5 * (2 * share * (1 - share) / 8000).sqrt()
    assert bool((((x == diffusion.mask).double().mean(0) - share).abs() <= error).all())


def test_any_point_can_be_reached_by_the_path_noised_from_it(law):
    diffusion, x0 = diffusion_of(law), sequences(2)
    path = noise_back(diffusion, x0, None, generator=seeded())
    assert bool(path_log_prob(diffusion, Table(2), path).isfinite().all())
    assert bool((path.x[-1] == diffusion.mask).all()) and torch.equal(path.x0, x0)


def test_mean_denoising_loss_is_the_negative_evidence_lower_bound_a_token(law):
    """E over noised paths of log q(path) - log p(path), and E over levels of the loss, in full."""
    diffusion, x0 = diffusion_of(law), torch.tensor([[1, 0, 1]])
    path = all_paths(diffusion, x0)
    log_noising = path_log_prob(diffusion, certain_of(x0), path)
    possible = log_noising.isfinite()
    path, log_noising = Trajectory(path.x[:, possible]), log_noising[possible]
    gap = log_noising - path_log_prob(diffusion, Table(2), path)
    bound = (log_noising.exp() * gap).sum() / LENGTH
    losses = []
    for k in range(1, diffusion.levels + 1):
        x, rows = path.x[k], torch.full((len(gap),), k)
        each = diffusion.denoising_loss(Table(2)(x, rows, None), x0.expand_as(x), x, rows)
        losses.append((log_noising.exp() * each).sum())
    torch.testing.assert_close(torch.stack(losses).mean(), bound)
    exact = -final_law(diffusion, Table(2))[index_of(x0, 3)].log().item() / LENGTH
    tight = isinstance(law, FixedOrder)  # one path alone ends in x0
    assert bound.item() == pytest.approx(exact) if tight else bound > exact + 1e-3


def test_log_ratio_counts_every_token_once_where_it_is_revealed(law):
    diffusion, posterior, prior = diffusion_of(law), Table(2, 1), Table(2, 2)
    path, total = rollout_against(diffusion, posterior, prior, None, 20, generator=seeded())
    by_hand = torch.zeros(20, dtype=torch.float64)
    for row, position in product(range(20), range(LENGTH)):
        tokens = path.x[:, row, position].tolist()
        time = tokens.index(diffusion.mask)
        x, level = path.x[time, row : row + 1], torch.tensor([time])
        for network, sign in ((posterior, 1), (prior, -1)):
            by_hand[row] += sign * network(x, level, None)[0, position, tokens[0]].detach()
    torch.testing.assert_close(total, by_hand)
    for chunk in (None, 7):
        ratio = log_ratio(diffusion, posterior, prior, path, chunk=chunk)
        torch.testing.assert_close(ratio.detach(), by_hand)
    expected = path_log_prob(diffusion, posterior, path) - path_log_prob(diffusion, prior, path)
    torch.testing.assert_close(by_hand, expected.detach())


@pytest.mark.parametrize("shifted", [False, True])
def test_gradient_in_chunks_is_that_of_the_weighted_log_ratio(shifted):
    diffusion = diffusion_of(LAWS["linear"])
    posterior = shifted_table(diffusion.levels) if shifted else Table(2, 1)
    path = rollout(diffusion, posterior, None, 12, generator=seeded())
    weight = normal(12, seed=5)
    ratio = log_ratio(diffusion, posterior, Table(2, 2), path)
    parameters = list(posterior.parameters())
    expected = torch.autograd.grad((weight * ratio).sum(), parameters)
    backward_in_chunks(diffusion, posterior, path, weight, chunk=5)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
        assert bool(gradient.any())


def test_log_ratio_of_a_shift_includes_the_choice_of_positions():
    diffusion = diffusion_of(LAWS["cosine"])
    posterior, prior = shifted_table(diffusion.levels), Table(2, 2)
    path, total = rollout_against(diffusion, posterior, prior, None, 50, generator=seeded())
    expected = path_log_prob(diffusion, posterior, path) - path_log_prob(diffusion, prior, path)
    torch.testing.assert_close(total, expected.detach())


@pytest.mark.parametrize("wrap", [lambda network: network, OnDemand])
def test_raw_logits_are_refused_wherever_a_token_is_drawn_scored_or_learned(wrap):
    """Drawing would normalise them and scoring would not."""
    diffusion, x0 = diffusion_of(LAWS["linear"]), torch.tensor([[1, 0, 1]]).expand(8, -1)
    logits = Table(2).logits.detach()
    raw = wrap(lambda x, level, condition: logits[index_of(x, 3)])
    path = noise_back(diffusion, x0, None, generator=seeded())
    level = torch.full((8,), diffusion.levels)
    masked = path.x[-1]
    for use in (
        lambda: rollout(diffusion, raw, None, 8, generator=seeded()),
        lambda: log_ratio(diffusion, raw, Table(2), path, levels=level[None]),
        lambda: log_ratio(diffusion, Table(2), raw, path, levels=level[None]),
        lambda: diffusion.denoising_loss(raw(masked, level, None), x0, masked, level),
    ):
        with pytest.raises(ValueError, match="sum to .*TokenLogits"):
            use()


def test_what_is_said_of_tokens_that_are_clean_may_be_anything():
    diffusion, level = diffusion_of(LAWS["linear"]), torch.full((2,), 2)
    x = torch.tensor([[1, 2, 0], [2, 2, 2]])
    log_probs = torch.where((x == 2)[..., None], math.log(0.5), 7.0).expand(-1, -1, 2)
    drawn = diffusion.kernel(log_probs, x, level).sample(generator=seeded())
    assert drawn[0, 0] == 1 and drawn[0, 2] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_log_probabilities_are_none_the_less(dtype):
    """A hundred tokens alike in bfloat16 sum to 1.01."""
    diffusion = diffusion_of(LAWS["linear"], 100)
    x, level = torch.full((4, LENGTH), 100), torch.full((4,), 2)
    for logits in (torch.zeros(4, LENGTH, 100), 5 * normal(4, LENGTH, 100)):
        diffusion.kernel(logits.to(dtype).log_softmax(-1), x, level)
    with pytest.raises(ValueError, match="TokenLogits"):
        diffusion.kernel(torch.zeros(4, LENGTH, 100, dtype=dtype) - 4.4, x, level)
