"""Gaps in sequences of a Markov chain, with a network that knows the chain: all is as computed."""

import itertools
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    OnDemand,
    elbo,
    importance_log_z,
    log_weight,
    rollout_against,
)
from rtb_rl.core.protocols import Condition
from rtb_rl.nn.transformer import MaskedTransformer
from rtb_rl.tasks.language.denoiser import TextPrior
from rtb_rl.tasks.language.markov import MarkovChain, stationary_law
from rtb_rl.tasks.language.markov_fit import AT_ONCE, few_at_once
from rtb_rl.tasks.language.markov_world import MarkovWorld, WorldSettings, token_marginals
from rtb_rl.tasks.language.posterior import fit_text_posterior
from rtb_rl.tasks.language.prompts import Prompts, story_gaps
from rtb_rl.tasks.language.trainers import TextPosteriorSettings, relative_trajectory_balance
from rtb_rl.training import FinetuneSettings, Mix

VOCABULARY, LEVELS = 3, 6


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


TRANSITION = torch.tensor([[0.1, 0.7, 0.2], [0.2, 0.1, 0.7], [0.6, 0.3, 0.1]], dtype=torch.float64)
CHAIN = MarkovChain(stationary_law(TRANSITION), TRANSITION)
WORLD = MarkovWorld(CHAIN, left=2, gap=2, right=2)


class Exact(nn.Module):
    """Logits of each token given all that is known: the chain's own conditional laws."""

    def __init__(self, world: MarkovWorld):
        super().__init__()
        size = world.frame.codec.vocabulary
        self.codec = world.frame.codec
        log_transition = torch.full((size, size), -30.0, dtype=torch.float64)
        inside = slice(1, 1 + world.chain.vocabulary)
        log_transition[inside, inside] = world.chain.transition.log()
        self.log_transition = nn.Parameter(log_transition)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        step = self.log_transition.exp()
        known = (x != self.codec.mask) & (x != self.codec.pad)
        rows = []
        for tokens, is_known in zip(x, known, strict=True):
            places = is_known.nonzero().flatten().tolist()
            row = []
            for i in range(len(tokens)):
                before = [p for p in places if p < i]
                after = [p for p in places if p > i]
                law = torch.ones(len(step), dtype=step.dtype)
                if before:
                    law = law * torch.linalg.matrix_power(step, i - before[-1])[tokens[before[-1]]]
                if after:
                    law = law * torch.linalg.matrix_power(step, after[0] - i)[:, tokens[after[0]]]
                row.append(law.log())
            rows.append(torch.stack(row))
        return torch.stack(rows)


def exact_prior(world: MarkovWorld = WORLD) -> TextPrior:
    return TextPrior(world.frame, Exact(world), LEVELS, {})


def middles() -> Tensor:
    return torch.tensor(list(itertools.product(range(VOCABULARY), repeat=WORLD.gap)))


def test_conditions_hide_the_middle_alone():
    sequences = torch.tensor([[0, 1, 2, 0, 1, 1], [2, 2, 2, 1, 0, 1]])
    condition = WORLD.conditions(sequences)
    mask = VOCABULARY + 1
    assert condition["tokens"].tolist() == [[1, 2, mask, mask, 2, 2], [3, 3, mask, mask, 1, 2]]
    assert condition["free"].tolist() == [[2, 3]] * 2
    assert condition["right"].int().tolist() == [[0, 0, 0, 0, 1, 1]] * 2


def test_the_truth_is_that_of_enumeration():
    condition, _ = WORLD.draw(5, generator=seeded(1))
    log_z, marginals = WORLD.truth(condition)
    for row in range(5):
        each = {name: tensor[row : row + 1].expand(9, -1) for name, tensor in condition.items()}
        z = middles()
        left = each["tokens"][:, 1] - 1
        weight = CHAIN.prior_log_prob(left, z) + WORLD.log_reward(z + 1, each)
        assert float(log_z[row]) == pytest.approx(float(weight.logsumexp(0)), abs=1e-12)
        law = weight.softmax(0)
        for slot in range(2):
            wanted = torch.stack([law[z[:, slot] == v].sum() for v in range(VOCABULARY)])
            torch.testing.assert_close(marginals[row, slot], wanted)


def test_examples_are_gaps_with_and_without_what_follows():
    n = 4000
    x0, condition = WORLD.examples(n, generator=seeded())
    tokens, free = condition["tokens"], condition["free"]
    assert free.tolist() == [[2, 3]] * n and bool((tokens[:, :2] > 0).all())
    assert bool(((x0 >= 1) & (x0 <= VOCABULARY)).all())
    assert bool((tokens[:, 2:4] == WORLD.frame.codec.mask).all())
    cut = (tokens[:, 4:] == 0).all(1)
    assert bool((tokens[~cut, 4:] > 0).all())
    assert float(cut.double().mean()) == pytest.approx(0.5, abs=4 * 0.5 / n**0.5)
    pairs = torch.stack([tokens[:, 1] - 1, x0[:, 0] - 1], 1)  # a gap goes on from its left context
    for token in range(VOCABULARY):
        after = pairs[pairs[:, 0] == token, 1].bincount(minlength=VOCABULARY).double()
        wanted = CHAIN.transition[token]
        error = 4.5 * (wanted * (1 - wanted) / after.sum()).sqrt()
        assert bool(((after / after.sum() - wanted).abs() < error).all())


def test_marginals_along_paths_are_those_of_the_chain():
    """Whatever is revealed together: each token has its own conditional law at that step."""
    condition, _ = WORLD.draw(4, generator=seeded(2))
    prior, n = exact_prior(), 400
    _, wanted = WORLD.truth(condition)
    with torch.no_grad():
        found = token_marginals(
            prior.diffusion, prior.both_sides(), condition, n, generator=seeded()
        )
    tokens = found[..., 1 : 1 + VOCABULARY]
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 2, dtype=found.dtype))
    assert (tokens - wanted).abs().max() < 4 * 0.5 / n**0.5
    assert (tokens - wanted).abs().mean() < 0.02
    with torch.no_grad():
        left = token_marginals(prior.diffusion, prior.left_only(), condition, n, generator=seeded())
    assert (left[..., 1 : 1 + VOCABULARY] - wanted).abs().mean() > 0.05


def test_the_prior_s_paths_weigh_log_z():
    condition, _ = WORLD.draw(3, generator=seeded(3))
    world = MarkovWorld(CHAIN, left=2, gap=1, right=2)
    prior, n = exact_prior(world), 2000
    condition, _ = world.draw(3, generator=seeded(3))
    each = {name: tensor.repeat_interleave(n, 0) for name, tensor in condition.items()}
    denoisers = OnDemand(prior.both_sides()), OnDemand(prior.left_only())
    with torch.no_grad():
        path, ratio = rollout_against(prior.diffusion, *denoisers, each, 3 * n, generator=seeded())
    weight = log_weight(world.log_reward(path.x0, each), ratio, 1.0)
    # of one token the law given both sides is the posterior: every path weighs Z
    log_z, _ = world.truth(condition)
    torch.testing.assert_close(weight, log_z.repeat_interleave(n), rtol=1e-5, atol=1e-5)


def stories(world: MarkovWorld, n: int) -> list[tuple[str, ...]]:
    """Sequences as texts of three sentences: left, middle, right."""
    tokens = world.chain.sample(n, world.window, generator=seeded(5)) + 1
    cuts = world.left, world.left + world.gap
    return [tuple(" ".join(map(str, p)) for p in _cut(row, cuts)) for row in tokens.tolist()]


def _cut(row: list[int], cuts: tuple[int, int]) -> tuple[list[int], list[int], list[int]]:
    return row[: cuts[0]], row[cuts[0] : cuts[1]], row[cuts[1] :]


def test_a_posterior_finds_the_truth_from_a_prior_that_knows_the_chain(tmp_path):
    """One free token: the right context in full view is the posterior, and log Z is known."""
    world = MarkovWorld(CHAIN, left=1, gap=1, right=1)
    prior = exact_prior(world)
    prompts = Prompts.of(world.frame, story_gaps(stories(world, 60), 1))

    def reward(gaps: Any) -> Tensor:
        return torch.stack(
            [CHAIN.transition[int(gap.middle) - 1, int(gap.right) - 1].log() for gap in gaps]
        )

    settings = TextPosteriorSettings(
        finetune=FinetuneSettings(
            updates=60,
            beta_warmup=1,
            conditions=8,
            mix=Mix(on_policy=8, data=0),
            levels_per_path=None,
            learning_rate=3e-3,
            average_decay=0.9,
        )
    )
    found = fit_text_posterior(
        tmp_path / "posterior",
        prior,
        prompts,
        reward,
        settings,
        make_trainer=relative_trajectory_balance(),
    )
    n = 20
    each = {name: tensor.repeat_interleave(n, 0) for name, tensor in prompts.condition.items()}
    task = found.task
    before = []
    for denoiser in (OnDemand(prior.left_only()), task.posterior):
        with torch.no_grad():
            path, ratio = rollout_against(
                task.diffusion, denoiser, task.prior, each, 60 * n, generator=seeded()
            )
        weight = log_weight(task.log_reward(path.x0, each), ratio, 1.0).reshape(60, n)
        before.append(weight)
    log_z, _ = world.truth(prompts.condition)
    gaps = [float((log_z - elbo(weight)).mean()) for weight in before]
    assert gaps[0] > 0.2 and abs(gaps[1]) < 0.01, gaps
    error = (importance_log_z(before[1].double())[0] - log_z).abs()
    assert error.max() < 0.05


def test_a_prior_of_the_world_is_a_transformer_for_its_window():
    prior = WORLD.prior(WorldSettings(levels=5, width=16, depth=1), generator=seeded())
    assert isinstance(prior.network, MaskedTransformer) and prior.levels == 5
    assert prior.diffusion.length == WORLD.gap
    task = WORLD.task(prior, prior.network)
    condition, x0 = task.draw_conditions(4, generator=seeded())
    assert x0 is None
    path, ratio = rollout_against(
        task.diffusion, task.posterior, task.prior, condition, 4, generator=seeded()
    )
    drawn = path.x0
    assert bool(((drawn >= 1) & (drawn <= VOCABULARY)).all())
    assert task.log_reward(drawn, condition).shape == (4,) and bool(ratio.isfinite().all())


def test_rows_measured_a_few_at_once_come_in_their_order():
    condition, rows = {"tokens": torch.arange(10).reshape(5, 2)}, []

    def measure(part: dict[str, Tensor]) -> Tensor:
        rows.append(len(part["tokens"]))
        return part["tokens"].sum(1)

    found = few_at_once(measure, condition, AT_ONCE // 2)
    assert rows == [2, 2, 1]
    assert torch.equal(found, condition["tokens"].sum(1))
    assert torch.equal(few_at_once(measure, condition, 2 * AT_ONCE), found)
    assert rows[3:] == [1] * 5
