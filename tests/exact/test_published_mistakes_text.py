"""Where the code published with arXiv 2405.20971 departs from the paper: text.

Rows 7 to 11 of the list that test_published_mistakes.py begins.
"""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    GaussianKernel,
    GroupMeanLogZ,
    IndependentReveals,
    MaskedDiffusion,
    MaskingSchedule,
    TokenLogits,
    kernels,
    linear_masking,
    log_probs,
    objective,
    rollout,
)
from rtb_rl.core.protocols import Condition
from rtb_rl.tasks.language import ContinuationLikelihood, Gap, LanguageModel, train_word_codec
from rtb_rl.tasks.toy import TokenSpace, terminal_law


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def test_row_07_minus_the_mean(catches):
    """Text loss: squares (term + mean) instead of (term - mean), driving log Z to 0 as well."""
    phi, group = 0.3, 4  # p_post = N(phi, 1), prior N(0, 1), log r = x: KL gradient phi - 1
    eps = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=group))).flatten()
    x0 = phi + eps  # moments of eps up to the third are those of N(0, 1)

    def gradient_is_that_of_the_kl():
        ratio = (phi * x0 - phi**2 / 2).requires_grad_()
        log_z = GroupMeanLogZ(group)(None, x0 - ratio)
        (slope,) = torch.autograd.grad(objective.rtb()(log_z, ratio, x0, 1.0) / 2, [ratio])
        expected = (group - 1) / group * (phi - 1)  # -0.525; the mistake makes it -1.225
        assert float((slope * eps).sum()) == pytest.approx(expected, abs=1e-6)

    forward = GroupMeanLogZ.forward
    catches(gradient_is_that_of_the_kl, GroupMeanLogZ, "forward", lambda *args: -forward(*args))


def published_reveal_probability(schedule: MaskingSchedule) -> Tensor:
    """What its sampler does at keep probability 1 - (1 - 1e-3) k / K.

    A token is revealed with weight score (1 - kept[k] / kept[k - 1]), score = kept / (1 - kept) at
    level k instead of the staggered one, against weight 1 to stay.
    """
    kept = 1 - (1 - 1e-3) * torch.linspace(0, 1, schedule.levels + 1, dtype=torch.float64)
    weight = kept[1:] / (1 - kept[1:]) * (1 - kept[1:] / kept[:-1])
    return torch.cat([torch.zeros(1, dtype=torch.float64), weight / (1 + weight)])


class Bigrams(nn.Module):
    """p(next token | token), a table, as a causal network."""

    def __init__(self, size: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(size, size, generator=seeded(2)).log_softmax(-1))

    def at(self, tokens: Tensor, row: Tensor, place: Tensor) -> Tensor:
        return self.table[tokens[row, place]]


def test_row_08_what_follows_is_scored(catches):
    """Text reward: the last len(y) tokens of left context and gap are scored, y never is."""
    codec = train_word_codec(["a b c"], 7)
    network = Bigrams(codec.vocabulary)
    likelihood = ContinuationLikelihood(LanguageModel(network, codec))
    gap = Gap("a b", "c a", "b c")

    def reward_is_that_of_y_given_the_gap():
        a, c = (codec.encode([word])[0][0] for word in "ac")
        expected = network.table[c, c] + network.table[c, a]  # after the gap's last word, c
        torch.testing.assert_close(likelihood([gap]), expected.detach().reshape(1))

    def published(self: ContinuationLikelihood, gaps: Sequence[Gap]) -> Tensor:
        split = [f"{one.left} {one.middle}".split() for one in gaps]
        count = [len(one.right.split()) for one in gaps]
        before = [" ".join(words[:-n]) for words, n in zip(split, count, strict=True)]
        scored = [" ".join(words[-n:]) for words, n in zip(split, count, strict=True)]
        return self.model.log_prob(before, scored)

    catches(reward_is_that_of_y_given_the_gap, ContinuationLikelihood, "__call__", published)


def masks_left() -> list[float]:
    """The share of masks after each of six steps."""
    reveals = IndependentReveals(linear_masking(6), 1)
    level = torch.arange(6, 0, -1)
    kept = 1 - reveals.probability(torch.ones(6, 1, dtype=torch.bool), level)
    return kept.flatten().cumprod(0).tolist()


def test_row_09_reveal_probability(catches):
    """Text kernel: the staggered score is discarded, so reveal probabilities are wrong."""

    def a_sixth_is_revealed_in_each_step():
        assert masks_left() == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0], abs=1e-12)

    def no_mask_is_left_in_the_end():
        diffusion = MaskedDiffusion(50, 2, IndependentReveals(linear_masking(6), 50))
        coin = torch.full((20, 50, 2), 0.5).log()
        path = rollout(diffusion, lambda x, level, condition: coin, None, 20, generator=seeded())
        assert not (path.x0 == 2).any()

    wrong = property(published_reveal_probability)
    for check in (a_sixth_is_revealed_in_each_step, no_mask_is_left_in_the_end):
        catches(check, MaskingSchedule, "reveal_probability", wrong)
    with pytest.MonkeyPatch.context() as patch:  # the numbers measured on the published code
        patch.setattr(MaskingSchedule, "reveal_probability", wrong)
        assert masks_left() == pytest.approx([0.999, 0.908, 0.778, 0.622, 0.445, 0.242], abs=5e-4)


class Logits(nn.Module):
    """Random logits for the tokens and the mask, the last; of one row for every input."""

    def __init__(self, length: int, vocabulary: int, dtype: torch.dtype):
        super().__init__()
        logits = 2 * torch.randn((length, vocabulary + 1), generator=seeded(1))
        self.register_buffer("logits", logits.to(dtype))

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        assert isinstance(self.logits, Tensor)
        return self.logits.expand(len(x), -1, -1)


def test_row_10_scored_as_sampled(catches):
    """Text, last step: sampled without the mask token but scored with it in the normalisation."""
    space, network = TokenSpace(3, 2), Logits(2, 3, torch.float64)
    diffusion = MaskedDiffusion(2, 3, IndependentReveals(linear_masking(1), 2))

    def scores_are_the_law_of_the_samples():
        denoiser = TokenLogits(network, 3)
        law = terminal_law(diffusion, denoiser)
        drawn = rollout(diffusion, denoiser, None, 20_000, generator=seeded()).x0
        error = 4.5 * (law * (1 - law) / len(drawn)).sqrt()
        assert bool(((space.frequencies(drawn) - law).abs() < error).all())
        assert float(law.sum()) == pytest.approx(1, abs=1e-12)

    def with_the_mask(self: TokenLogits, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        log_probs = self.network(x, level, condition).log_softmax(-1)
        is_mask = torch.arange(log_probs.shape[-1]) == self.mask
        return log_probs.masked_fill(is_mask, -torch.inf)

    with pytest.MonkeyPatch.context() as patch:  # else it is refused before it is scored
        patch.setattr(log_probs, "check_normalised", lambda log_probs: None)
        catches(scores_are_the_law_of_the_samples, TokenLogits, "forward", with_the_mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenLogits, "forward", with_the_mask)
        with pytest.raises(ValueError, match="not to 1"):
            scores_are_the_law_of_the_samples()


def test_row_11_float32_log_probabilities(catches):
    """Text precision: log-softmax and the sums over it are taken in bfloat16."""
    length, mask = 256, 7
    half, full = Logits(length, mask, torch.bfloat16), Logits(length, mask, torch.bfloat16).double()
    diffusion = MaskedDiffusion(length, mask, IndependentReveals(linear_masking(1), length))
    x, level = torch.full((1, length), mask), torch.ones(1, dtype=torch.int64)
    tokens = torch.randint(mask, (1, length), generator=seeded())

    def score(prediction: Tensor) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return float(diffusion.kernel(prediction, x, level).log_prob(tokens))

    def logits_are_normalised_in_float32():
        exact = score(TokenLogits(full, mask)(x, level, None))
        assert score(TokenLogits(half, mask)(x, level, None)) == pytest.approx(exact, abs=1e-3)

    def in_bfloat16(self: TokenLogits, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        logits = self.network(x, level, condition)
        is_mask = torch.arange(logits.shape[-1]) == self.mask
        return logits.masked_fill(is_mask, -torch.inf).log_softmax(-1)

    catches(logits_are_normalised_in_float32, TokenLogits, "forward", in_bfloat16)

    def sums_are_taken_in_float32():
        log_probs = TokenLogits(half, mask)(x, level, None).bfloat16()
        assert score(log_probs) == pytest.approx(score(log_probs.double()), abs=1e-3)

    def squares_are_summed_in_float32():
        mean = torch.randn((1, 512), generator=seeded()).bfloat16()
        gaussian, exact = (
            GaussianKernel(m, torch.ones(1, dtype=m.dtype)).log_prob(0 * m)
            for m in (mean, mean.double())
        )
        assert float(gaussian) == pytest.approx(float(exact), abs=1e-3)

    for check in (sums_are_taken_in_float32, squares_are_summed_in_float32):
        catches(check, kernels, "_at_least_float32", lambda *tensors: list(tensors))
