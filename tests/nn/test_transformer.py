"""Small transformers: what sees what, and that nothing depends on how the work is cut up."""

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from rtb_rl.nn import transformer
from rtb_rl.nn.transformer import (
    GATE_SCALE,
    CausalTransformer,
    GatedTransformer,
    MaskedTransformer,
)

VOCABULARY, PAD, LENGTH = 11, 0, 7
SHAPE = {"width": 16, "depth": 2, "heads": 2}
KINDS = (MaskedTransformer, CausalTransformer)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def masked(seed: int = 0, **given) -> MaskedTransformer:
    made = MaskedTransformer(VOCABULARY, pad=PAD, **SHAPE, generator=seeded(seed), **given)
    return shaken(made)


def causal(seed: int = 0, **given) -> CausalTransformer:
    return shaken(CausalTransformer(VOCABULARY, **SHAPE, generator=seeded(seed), **given))


def shaken(network):
    """With norms and biases that are not those of the start."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name or "before" in name or name == "bias":
                parameter.add_(torch.randn(parameter.shape, generator=seeded(9)) / 4)
    return network


def tokens(rows: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=seeded(1))


def levels(x: Tensor) -> Tensor:
    return torch.ones(len(x), dtype=torch.int64)


def logits(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network(x, levels(x), None) if isinstance(network, MaskedTransformer) else network(x)


@pytest.mark.parametrize("positions", [0, LENGTH])
def test_padding_changes_nothing(positions):
    """Whether all rows have it (then it is cut off, beyond the last position too) or some."""
    network, x = masked(positions=positions), tokens()
    x[1:, 4:] = PAD
    whole = logits(network, x)
    for row, length in ((0, LENGTH), (1, 4)):
        alone = logits(network, x[row : row + 1, :length])[0]
        torch.testing.assert_close(whole[row, :length], alone, rtol=1e-5, atol=1e-5)
    longer = logits(network, torch.cat([x, torch.full((3, 5), PAD)], 1))
    assert longer.shape == (3, LENGTH + 5, VOCABULARY) and not longer[:, LENGTH:].any()
    assert torch.equal(longer[:, :LENGTH], whole)
    nothing = logits(network, torch.full((2, 3), PAD))
    assert nothing.shape == (2, 3, VOCABULARY) and bool(nothing.isfinite().all())


def test_padding_is_seen_by_a_network_that_takes_it_for_a_token():
    """Otherwise the test above could not fail."""
    x = tokens()
    x[1:, 4:] = PAD
    blind = masked()
    seeing = MaskedTransformer(VOCABULARY, pad=VOCABULARY, **SHAPE, generator=seeded())
    seeing.load_state_dict(blind.state_dict())
    difference = (logits(seeing, x) - logits(blind, x))[:, :4].abs().amax((1, 2))
    assert difference[0] < 1e-5 < 1e-2 < difference[1]


def test_masked_logits_at_places_are_those_of_the_whole():
    network, x = masked(), tokens(rows=4)
    x[2, 5:] = PAD
    row, place = torch.tensor([3, 0, 2, 0]), torch.tensor([6, 1, 4, 0])
    with torch.no_grad():
        found = network.at(x, levels(x), None, row, place)
    torch.testing.assert_close(found, logits(network, x)[row, place], rtol=1e-6, atol=1e-6)


def test_causal_logits_at_places_are_those_of_the_whole():
    network, x = causal(), tokens(rows=4)
    row, place = torch.tensor([3, 0, 2, 0]), torch.tensor([6, 1, 4, 0])
    with torch.no_grad():
        found = network.at(x, row, place)
    torch.testing.assert_close(found, logits(network, x)[row, place], rtol=1e-6, atol=1e-6)


def test_every_position_of_a_masked_transformer_sees_every_other():
    network, x = masked(), tokens(rows=1)
    for place in range(LENGTH):
        other = x.clone()
        other[0, place] = x[0, place] % (VOCABULARY - 1) + 1
        change = (logits(network, other) - logits(network, x)).abs().amax(-1)[0]
        assert bool((change > 1e-5).all()), place


def test_a_later_token_changes_no_earlier_logit():
    network, x = causal(), tokens(rows=1)
    for place in range(LENGTH):
        other = x.clone()
        other[0, place] = x[0, place] % (VOCABULARY - 1) + 1
        change = (logits(network, other) - logits(network, x)).abs().amax(-1)[0]
        assert not change[:place].any() and bool((change[place:] > 1e-5).all()), place
    shorter = logits(network, x[:, :4])
    torch.testing.assert_close(logits(network, x)[:, :4], shorter, rtol=1e-5, atol=1e-5)


def test_position_matters():
    """The last token's logits change when two tokens before it change places."""
    for network in (masked(), causal()):
        x = torch.tensor([[3, 5, 2, 7, 1]])
        swapped = x[:, [1, 0, 2, 3, 4]]
        change = (logits(network, x) - logits(network, swapped))[0, -1].abs().max()
        assert change > 1e-3


def test_only_distances_matter():
    """Rotary positions: a sequence of one token again and again says the same everywhere."""
    network = masked()
    same = logits(network, torch.full((1, LENGTH), 4))
    torch.testing.assert_close(same, same[:, :1].expand_as(same), rtol=1e-5, atol=1e-5)


def test_positions_tell_columns_of_one_token_apart():
    """What `test_only_distances_matter` says of a network without them."""
    same = logits(masked(positions=LENGTH), torch.full((1, LENGTH), 4))[0]
    assert bool((torch.pdist(same) > 1e-2).all())


def test_a_sequence_beyond_the_last_position_is_refused():
    with pytest.raises(ValueError, match=f"{LENGTH} columns .* positions = {LENGTH - 1}"):
        logits(masked(positions=LENGTH - 1), tokens())


@pytest.mark.parametrize("make", [masked, causal])
def test_weights_follow_from_the_generator_alone(make):
    one = make(3).state_dict()
    torch.rand(5)  # the global one is elsewhere now
    other = make(3).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    third = make(4).state_dict()
    matrices = [name for name in one if one[name].ndim == 2]
    assert len(matrices) == 1 + 2 * 4  # the tokens, and four layers a block
    for name in matrices:
        assert not torch.equal(one[name], third[name]), name


class OnMeta(Generator):
    """A generator of a device that is not the CPU: what a GPU's would be."""

    device = property(lambda self: torch.device("meta"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_on_the_device_of_the_generator(kind):
    given = {"pad": PAD} if kind is MaskedTransformer else {}
    network = kind(VOCABULARY, **SHAPE, **given, generator=OnMeta())
    if isinstance(network, MaskedTransformer):
        network = GatedTransformer(network)
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


def test_weights_of_two_bytes_are_finite_where_nothing_is_seen():
    """Float16 has no number below -65504."""
    q, k = (torch.randn((1, 2, LENGTH, 8), generator=seeded(seed)).half() for seed in range(2))
    seen = torch.ones((LENGTH, LENGTH), dtype=torch.bool).tril(-1)
    found = transformer._weights(q, k, seen)
    assert bool(found.isfinite().all())
    assert not found[..., 1:, :][..., ~seen[1:]].any()


@pytest.mark.parametrize("make", [masked, causal])
def test_half_precision_is_near_single_precision(make):
    """And gives logits in that of the weights, of which none is in half precision."""
    single, half = make(), make(precision=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    x = tokens(rows=8)
    one, other = logits(single, x), logits(half, x)
    assert other.dtype == torch.float32
    error = (one - other).abs()
    assert 0 < error.mean() < 0.02 * one.std() and error.max() < 0.1 * one.std()


@pytest.mark.parametrize("make", [masked, causal])
def test_half_precision_has_near_gradients(make):
    x, found = tokens(rows=8), []
    for network in (make(), make(precision=torch.bfloat16)):
        output = network(x, levels(x), None) if make is masked else network(x)
        functional.cross_entropy(output.flatten(0, 1), x.flatten()).backward()
        found.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert functional.cosine_similarity(*found, dim=0) > 0.999


@pytest.mark.parametrize("causally", [False, True])
def test_attention_in_half_precision_is_that_of_torch(causally):
    shape = (2, 2, LENGTH, 8)
    q, k, v = (torch.randn(shape, generator=seeded(seed)).bfloat16() for seed in range(3))
    if causally:
        seen = torch.ones((LENGTH, LENGTH), dtype=torch.bool).tril()
    else:
        seen = torch.ones((2, 1, 1, LENGTH), dtype=torch.bool)
        seen[1, ..., 5:] = False
    found = transformer._attention(q, k, v, seen)
    wanted = functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=seen
    )
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0.03, atol=0.03)
    everything = functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert (found.float() - everything).abs().max() > 0.3


def test_attention_in_single_precision_is_softmax_by_hand():
    q, k, v = (torch.randn((1, 2, LENGTH, 8), generator=seeded(seed)) for seed in range(3))
    seen = torch.ones((LENGTH, LENGTH), dtype=torch.bool).tril()
    weight = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    found = transformer._attention(q, k, v, seen)
    torch.testing.assert_close(found, weight @ v, rtol=1e-5, atol=1e-5)


def right_of(places: list[int], rows: int = 3) -> dict[str, Tensor]:
    """A condition in which what is from a place on stands to the right, a place for each row."""
    column = torch.arange(LENGTH).expand(rows, -1)
    return {"right": column >= torch.tensor(places)[:, None]}


def gated(gate: float, **given) -> GatedTransformer:
    network = GatedTransformer(masked(**given))
    with torch.no_grad():
        network.gate.fill_(gate / GATE_SCALE)
    return network


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_a_closed_gate_shows_nothing_and_an_open_one_everything(precision):
    """Left of the gap's end, for every row its own; a row may have nothing to its right."""
    x, condition = tokens(), right_of([4, 6, LENGTH])
    tolerance = 1e-5 if precision is None else 0.1
    hidden = torch.where(condition["right"], PAD, x)
    plain = masked(precision=precision)
    with torch.no_grad():
        closed, half, full = (
            gated(gate, precision=precision)(x, levels(x), condition) for gate in (0, 0.5, 1)
        )
    shown = ~condition["right"]
    without, everything = logits(plain, hidden), logits(plain, x)
    assert (closed - without)[shown].abs().max() < tolerance
    assert (full - everything)[shown].abs().max() < tolerance
    changed = (without - everything).abs().amax(-1)
    assert changed[:2][shown[:2]].min() > 1e-3 and changed[2].max() < tolerance
    if precision is None:
        assert (half - without).abs().amax(-1)[:2][shown[:2]].min() > 1e-4
        assert (half - everything).abs().amax(-1)[:2][shown[:2]].min() > 1e-4


def test_a_gated_transformer_may_be_asked_for_places():
    network, x, condition = gated(0.3), tokens(), right_of([4, 6, LENGTH])
    x[2, 5:] = PAD
    row, place = torch.tensor([0, 2, 1]), torch.tensor([3, 4, 0])
    with torch.no_grad():
        whole = network(x, levels(x), condition)
        found = network.at(x, levels(x), condition, row, place)
    torch.testing.assert_close(found, whole[row, place], rtol=1e-6, atol=1e-6)


def test_a_closed_gate_can_open():
    """Its gradient is not zero where it is, so that what is right of the gap can fade in."""
    network, x, condition = gated(0), tokens(), right_of([4, 4, 4])
    output = network(x, levels(x), condition)[:, :4]
    functional.cross_entropy(output.flatten(0, 1), x[:, :4].flatten()).backward()
    assert network.gate.shape == (2, 2) and network.gate.grad is not None
    assert bool((network.gate.grad != 0).all())
