"""Predictions on demand: the same numbers as the denoiser's for the same generator, for less work.

The network is a table, so that evaluating fewer rows changes no bit of what it says of a row.
"""

import pytest
import torch
from torch import Generator, Tensor, nn

from rtb_rl.baselines.draws import CountedDenoiser
from rtb_rl.core import (
    IndependentReveals,
    Infilling,
    MaskedDiffusion,
    OnDemand,
    OnDemandLogProbs,
    RandomOrder,
    RevealPrediction,
    Sampler,
    TokenLogits,
    backward_in_chunks,
    denoising_posterior_loss,
    linear_masking,
    log_ratio,
    noise_back,
    rollout,
    rollout_against,
)
from rtb_rl.core.protocols import Condition
from rtb_rl.training import Pretrainer, PretrainSettings

SEQUENCE, SLOTS, VOCABULARY, LEVELS, ROWS = 6, 3, 5, 8, 12
MASK = VOCABULARY
LAW = IndependentReveals(linear_masking(LEVELS), SLOTS)
DIFFUSION = MaskedDiffusion(SLOTS, MASK, LAW)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


class Table(nn.Module):
    """Logits of a position from the token before it and the position itself; counts its rows."""

    def __init__(self, seed: int):
        super().__init__()
        shape = (VOCABULARY + 1, SEQUENCE, VOCABULARY + 1)
        logits = torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
        self.logits = nn.Parameter(logits)
        self.rows = 0

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        self.rows += len(x)
        return self.logits[x.roll(1, 1), torch.arange(SEQUENCE)] + level[:, None, None]


def infilling(seed: int) -> Infilling:
    return Infilling(TokenLogits(Table(seed), MASK))


def network(denoiser: Infilling) -> Table:
    found = denoiser.network.network
    assert isinstance(found, Table)
    return found


def condition(rows: int = ROWS) -> dict[str, Tensor]:
    """Gaps of one, two and three slots, at different places."""
    tokens = torch.randint(VOCABULARY, (rows, SEQUENCE), generator=seeded(7))
    free = torch.tensor([[2, 3, 4], [1, 2, -1], [5, -1, -1]]).repeat(-(-rows // 3), 1)[:rows]
    return {"tokens": tokens, "free": free}


PRIOR, POSTERIOR = infilling(0), infilling(1)


class Shifted(nn.Module):
    """A denoiser of tokens that reveals some positions early."""

    def __init__(self, denoiser: nn.Module, seed: int):
        super().__init__()
        self.denoiser = denoiser
        shift = torch.randn((LEVELS + 1, SLOTS), generator=seeded(seed), dtype=torch.float64)
        self.shift = nn.Parameter(shift)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> RevealPrediction:
        return RevealPrediction(self.denoiser(x, level, condition), self.shift[level])


def plain(denoiser: Infilling) -> nn.Module:
    return denoiser


def shifted(denoiser: Infilling) -> nn.Module:
    return Shifted(denoiser, 3 if denoiser is POSTERIOR else 4)


def on_demand(denoiser: nn.Module) -> nn.Module:
    if isinstance(denoiser, Shifted):
        found = Shifted(OnDemand(denoiser.denoiser), 0)
        found.shift = denoiser.shift
        return found
    return OnDemand(denoiser)


def unseen(path: Tensor, free: Tensor) -> bool:
    """Whether some step of a path reveals nothing but unused slots."""
    revealed = (path[1:] == MASK) & (path[:-1] != MASK)
    used = (revealed & (free >= 0)).any(2).any(1)
    return bool((revealed.any(2).any(1) & ~used).any())


@pytest.mark.parametrize("widening", [1.0, 1.7])
@pytest.mark.parametrize("kind", [plain, shifted])
def test_paths_and_log_ratios_are_those_of_the_denoiser_to_the_last_bit(kind, widening):
    given = condition()
    prior, posterior = kind(PRIOR), kind(POSTERIOR)
    eager, ratio = rollout_against(
        DIFFUSION, posterior, prior, given, ROWS, widening=widening, generator=seeded()
    )
    lazy, same = rollout_against(
        DIFFUSION,
        on_demand(posterior),
        on_demand(prior),
        given,
        ROWS,
        widening=widening,
        generator=seeded(),
    )
    assert not unseen(eager.x, given["free"])
    assert torch.equal(eager.x, lazy.x) and torch.equal(ratio, same)
    assert ratio.abs().min() > 0 and same.dtype == torch.float64
    for chunk in (None, 5, 1):
        with torch.no_grad():
            again = log_ratio(DIFFUSION, on_demand(posterior), on_demand(prior), lazy, chunk=chunk)
            wanted = log_ratio(DIFFUSION, posterior, prior, eager, chunk=chunk)
        if kind is plain:
            assert torch.equal(again, wanted)
        else:  # where a chunk reveals no token, nothing says that shifts are wanted in float64
            torch.testing.assert_close(again.double(), wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(again.double(), ratio, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("law", [LAW, RandomOrder(SLOTS, per_step=2)])
def test_draws_and_paths_made_from_data_are_the_same(law):
    given, diffusion = condition(), MaskedDiffusion(SLOTS, MASK, law)
    drawn = [
        Sampler(diffusion, denoiser).sample(given, 4, generator=seeded(2))
        for denoiser in (PRIOR, OnDemand(PRIOR))
    ]
    assert torch.equal(*drawn) and len(drawn[0].unique(dim=0)) > 5
    path = noise_back(diffusion, drawn[0][:, 0], given, generator=seeded(3))
    with torch.no_grad():
        eager = log_ratio(diffusion, POSTERIOR, PRIOR, path)
        lazy = log_ratio(diffusion, OnDemand(POSTERIOR), OnDemand(PRIOR), path)
    assert torch.equal(eager, lazy) and bool((eager != 0).all())


def test_gradients_are_the_same_whatever_the_chunk():
    """Also in chunks of one row, of which many reveal nothing at all."""
    given = condition()
    path = rollout(DIFFUSION, POSTERIOR, given, ROWS, generator=seeded())
    weight = torch.randn(ROWS, generator=seeded(5), dtype=torch.float64)
    table = network(POSTERIOR).logits
    found = []
    for denoiser, chunk in ((POSTERIOR, None), *((OnDemand(POSTERIOR), c) for c in (None, 7, 1))):
        backward_in_chunks(DIFFUSION, denoiser, path, weight, chunk=chunk)
        assert table.grad is not None
        found.append(table.grad)
        table.grad = None
    assert found[0].abs().sum() > 1
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=1e-12, atol=1e-12)


def test_the_gradient_of_a_shift_is_the_same():
    given = condition()
    posterior = shifted(POSTERIOR)
    path = rollout(DIFFUSION, posterior, given, ROWS, generator=seeded())
    found = []
    for denoiser in (posterior, on_demand(posterior)):
        backward_in_chunks(DIFFUSION, denoiser, path, torch.ones(ROWS, dtype=torch.float64))
        found.append((posterior.shift.grad, network(POSTERIOR).logits.grad))
        posterior.shift.grad = network(POSTERIOR).logits.grad = None
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert one.abs().sum() > 0.1


def test_a_chunk_that_reveals_nothing_has_no_gradient_and_breaks_nothing():
    given = condition(1)
    path = rollout(DIFFUSION, PRIOR, given, 1, generator=seeded(1))
    still = (path.x[1:] == path.x[:-1]).all(2).squeeze(1)
    assert bool(still.any())
    level = (still.nonzero()[:1] + 1).reshape(1, 1)
    weight = torch.ones(1, dtype=torch.float64)
    backward_in_chunks(DIFFUSION, OnDemand(PRIOR), path, weight, levels=level)
    assert network(PRIOR).logits.grad is None


def needed(path: Tensor, free: Tensor) -> int:
    """Rows at steps that reveal a used slot."""
    revealed = (path[1:] == MASK) & (path[:-1] != MASK)
    return int((revealed & (free >= 0)).any(2).sum())


def test_the_network_is_evaluated_for_rows_that_reveal_a_used_slot_alone():
    given = condition()
    table = network(PRIOR)
    table.rows = 0
    path = rollout(DIFFUSION, OnDemand(PRIOR), given, ROWS, generator=seeded(4))
    assert table.rows == needed(path.x, given["free"]) < LEVELS * ROWS
    table.rows = network(POSTERIOR).rows = 0
    denoisers = OnDemand(POSTERIOR), OnDemand(PRIOR)
    path, _ = rollout_against(DIFFUSION, *denoisers, given, ROWS, generator=seeded(4))
    assert table.rows == network(POSTERIOR).rows == needed(path.x, given["free"])


def test_a_denoiser_of_whole_sequences_is_asked_for_rows_as_well():
    diffusion = MaskedDiffusion(
        SEQUENCE, MASK, IndependentReveals(linear_masking(LEVELS), SEQUENCE)
    )
    table = Table(0)
    denoiser, level = TokenLogits(table, MASK), torch.full((4,), 3)
    eager = rollout(diffusion, denoiser, None, ROWS, generator=seeded())
    table.rows = 0
    lazy = rollout(diffusion, OnDemand(denoiser), None, ROWS, generator=seeded())
    assert torch.equal(eager.x, lazy.x)
    assert table.rows == needed(lazy.x, torch.zeros(ROWS, SEQUENCE)) < LEVELS * ROWS
    chosen = torch.zeros((4, SEQUENCE), dtype=torch.bool)
    chosen[2, 1] = chosen[0, 5] = chosen[2, 4] = True
    x, table.rows = eager.x[2, :4], 0
    assert torch.equal(OnDemand(denoiser)(x, level, None)[chosen], denoiser(x, level, None)[chosen])
    assert table.rows == 2 + 4


def test_a_row_costs_as_many_evaluations_as_the_formula_says():
    """K (1 - (1 - 1 / K)^L) for L used slots."""
    paths = 3000
    table = network(PRIOR)
    for row, used in enumerate((3, 2, 1)):
        given = {name: one[row : row + 1].expand(paths, -1) for name, one in condition().items()}
        table.rows = 0
        rollout(DIFFUSION, OnDemand(PRIOR), given, paths, generator=seeded(row))
        wanted = LEVELS * (1 - (1 - 1 / LEVELS) ** used)
        error = 4 * (used / 4 / paths) ** 0.5 if used > 1 else 1e-9  # counts lie in 1..used
        assert table.rows / paths == pytest.approx(wanted, abs=error)


def test_unused_slots_alone_cost_nothing_and_are_certain():
    given = condition(6)
    given["free"] = torch.full_like(given["free"], -1)
    table = network(PRIOR)
    table.rows = 0
    denoisers = OnDemand(PRIOR), OnDemand(POSTERIOR)
    path, ratio = rollout_against(DIFFUSION, *denoisers, given, 6, generator=seeded())
    assert table.rows == 0 and not path.x0.any() and ratio.tolist() == [0] * 6
    backward_in_chunks(DIFFUSION, OnDemand(PRIOR), path, torch.ones(6))
    assert table.logits.grad is None and table.rows == 0


def test_the_denoising_loss_is_the_same():
    given, level = condition(), torch.arange(ROWS) % LEVELS + 1
    x0 = torch.randint(VOCABULARY, (ROWS, SLOTS), generator=seeded(1))
    x0 = torch.where(given["free"] >= 0, x0, 0)
    x = DIFFUSION.corrupt(x0, level, generator=seeded(2))
    losses = [
        DIFFUSION.denoising_loss(denoiser(x, level, given), x0, x, level)
        for denoiser in (PRIOR, OnDemand(PRIOR), shifted(PRIOR), on_demand(shifted(PRIOR)))
    ]
    assert losses[0].sum() > 1
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-13, atol=1e-13)
    slopes = [torch.autograd.grad(loss.sum(), network(PRIOR).logits)[0] for loss in losses[:2]]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)


def test_pretraining_survives_batches_in_which_no_used_slot_is_masked():
    denoiser = infilling(2)
    given = {name: tensor[2:3] for name, tensor in condition().items()}  # one slot

    def draw(n: int, *, generator: Generator) -> tuple[Tensor, Condition]:
        return torch.tensor([[1, 0, 0]]), given

    settings = PretrainSettings(steps=20, batch=1)
    trainer = Pretrainer(DIFFUSION, OnDemand(denoiser), draw, settings, generator=seeded())
    losses = [float(trainer.update(step)["prior/loss"]) for step in range(20)]
    assert 0 in losses and max(losses) > 0


def test_the_loss_of_denoising_posterior_prediction_is_the_same():
    given = condition()
    x0 = torch.where(given["free"] >= 0, torch.tensor([1, 2, 3]), 0)
    found = []
    for prior, posterior in (
        (PRIOR, POSTERIOR),
        (OnDemand(PRIOR), OnDemand(POSTERIOR)),
        (on_demand(shifted(PRIOR)), on_demand(shifted(POSTERIOR))),
    ):
        loss = denoising_posterior_loss(
            DIFFUSION,
            posterior,
            prior,
            lambda x, level, condition: level.double(),
            x0,
            given,
            torch.arange(ROWS, dtype=torch.float64),
            0.7,
            generator=seeded(6),
        )
        (slope,) = torch.autograd.grad(loss, network(POSTERIOR).logits)
        found.append((loss.detach(), slope))
    assert found[0][0] > 0.1 and found[0][1].abs().sum() > 0.1
    for loss, slope in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slope, found[0][1], rtol=1e-12, atol=1e-12)


def test_a_counted_denoiser_counts_the_rows_asked_for():
    given = {name: tensor[::3] for name, tensor in condition().items()}  # every slot is used
    counted = CountedDenoiser(OnDemand(PRIOR))
    network(PRIOR).rows = 0
    path = rollout(DIFFUSION, counted, given, len(given["free"]), generator=seeded(1))
    assert counted.calls == network(PRIOR).rows == needed(path.x, given["free"])
    whole = CountedDenoiser(PRIOR)
    rollout(DIFFUSION, whole, given, len(given["free"]), generator=seeded(1))
    assert whole.calls == LEVELS * len(given["free"])


def test_an_answer_is_kept_for_the_same_question_where_no_gradient_is_wanted():
    asked = []

    def evaluate(chosen: Tensor) -> Tensor:
        asked.append(chosen)
        return torch.zeros(int(chosen.sum()), 2).log_softmax(-1)

    first = torch.tensor([[True, False], [True, True]])
    log_probs = OnDemandLogProbs(evaluate)
    with torch.no_grad():
        for chosen in (first, first.clone(), ~first, first):
            assert log_probs[chosen].shape == (int(chosen.sum()), 2)
        assert log_probs[torch.zeros_like(first)].shape[0] == 0
    assert len(asked) == 3
    log_probs[first], log_probs[first]
    assert len(asked) == 5


def test_tempered_answers_are_normalised():
    logits = torch.randn((2, 3, 4), generator=seeded(), dtype=torch.float64)
    chosen = torch.tensor([[True, False, True], [False, False, True]])
    log_probs = OnDemandLogProbs(lambda chosen: logits.log_softmax(-1)[chosen])
    hot = log_probs.tempered(2.0)[chosen]
    torch.testing.assert_close(hot, (logits / 2).log_softmax(-1)[chosen])
