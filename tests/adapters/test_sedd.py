"""SEDD: the published names and shapes, a naive forward pass, and conditionals out of scores."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rtb_rl.adapters.sedd import (
    LARGEST_SIGMA,
    AtLevel,
    Sedd,
    SeddSettings,
    is_sedd_config,
    score_denoiser,
    sedd_settings,
)
from rtb_rl.core import cosine_masking, linear_masking
from rtb_rl.errors import InputError

TINY = SeddSettings(tokens=7, hidden=16, blocks=2, heads=2, condition=6, length=12)

BLOCK = {  # of sedd-small: hidden 768, condition 128
    "norm1.weight": (768,),
    "attn_qkv.weight": (2304, 768),
    "attn_out.weight": (768, 768),
    "norm2.weight": (768,),
    "mlp.0.weight": (3072, 768),
    "mlp.0.bias": (3072,),
    "mlp.2.weight": (768, 3072),
    "mlp.2.bias": (768,),
    "adaLN_modulation.weight": (4608, 128),
    "adaLN_modulation.bias": (4608,),
}
SMALL = {
    "vocab_embed.embedding": (50258, 768),
    "sigma_map.mlp.0.weight": (128, 256),
    "sigma_map.mlp.0.bias": (128,),
    "sigma_map.mlp.2.weight": (128, 128),
    "sigma_map.mlp.2.bias": (128,),
    "rotary_emb.inv_freq": (32,),
    **{f"blocks.{i}.{name}": shape for i in range(12) for name, shape in BLOCK.items()},
    "output_layer.norm_final.weight": (768,),
    "output_layer.linear.weight": (50258, 768),
    "output_layer.linear.bias": (50258,),
    "output_layer.adaLN_modulation.weight": (1536, 128),
    "output_layer.adaLN_modulation.bias": (1536,),
}


def config(**model: Any) -> dict[str, Any]:
    """The entries of sedd-small's config.json that matter, and some that don't."""
    sizes = {"hidden_size": 768, "n_blocks": 12, "n_heads": 12, "cond_dim": 128, "length": 1024}
    return {
        "ngpus": 8,
        "tokens": 50257,
        "graph": {"type": "absorb", "file": "data", "report_all": False},
        "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
        "model": {"name": "small", **sizes, "scale_by_sigma": True, "dropout": 0.1, **model},
    }


def tiny(seed: int = 0, settings: SeddSettings = TINY) -> Sedd:
    """A network whose every parameter matters: none is left at zero or one."""
    network = Sedd(settings).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return network


def some_tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, TINY.tokens + 1, shape, generator=generator)


def naive(state: dict[str, Tensor], tokens: list[int], sigma: float, blocks: int, heads: int):
    """Log scores [length, V] of one text, written position by position and head by head."""
    hidden = state["vocab_embed.embedding"].shape[1]
    size, length = hidden // heads, len(tokens)
    frequencies = [math.exp(-math.log(10_000) * i / 128) for i in range(128)]
    waves = [math.cos(sigma * f) for f in frequencies] + [math.sin(sigma * f) for f in frequencies]
    c = state["sigma_map.mlp.0.weight"] @ torch.tensor(waves) + state["sigma_map.mlp.0.bias"]
    c = state["sigma_map.mlp.2.weight"] @ (c * c.sigmoid()) + state["sigma_map.mlp.2.bias"]
    c = c * c.sigmoid()

    def norm(v: Tensor, name: str) -> Tensor:
        centred = v - v.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * state[f"{name}.weight"]

    def gelu(v: Tensor) -> Tensor:
        return 0.5 * v * (1 + (math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)).tanh())

    def turned(v: Tensor, position: int) -> Tensor:
        out = v.clone()
        for i in range(size // 2):
            angle = position * 10_000 ** (-2 * i / size)
            a, b = v[i], v[i + size // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + size // 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    x = [state["vocab_embed.embedding"][token] for token in tokens]
    for index in range(blocks):
        at = {n: state[f"blocks.{index}.{n}"] for n in BLOCK}
        parts = (at["adaLN_modulation.weight"] @ c + at["adaLN_modulation.bias"]).split(hidden)
        shift, scale, gate, shift_2, scale_2, gate_2 = parts
        inputs = [norm(v, f"blocks.{index}.norm1") * (1 + scale) + shift for v in x]
        mixed = [torch.zeros(hidden) for _ in x]
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            q, k, v = (
                [at["attn_qkv.weight"][j * hidden :][own] @ u for u in inputs] for j in range(3)
            )
            q = [turned(u, i) for i, u in enumerate(q)]
            k = [turned(u, i) for i, u in enumerate(k)]
            for i in range(length):
                weights = torch.stack([q[i] @ k[j] / math.sqrt(size) for j in range(length)])
                weights = weights.exp() / weights.exp().sum()
                mixed[i][own] = torch.stack([weights[j] * v[j] for j in range(length)]).sum(0)
        x = [u + gate * (at["attn_out.weight"] @ m) for u, m in zip(x, mixed)]
        for i, u in enumerate(x):
            inner = norm(u, f"blocks.{index}.norm2") * (1 + scale_2) + shift_2
            inner = gelu(at["mlp.0.weight"] @ inner + at["mlp.0.bias"])
            x[i] = u + gate_2 * (at["mlp.2.weight"] @ inner + at["mlp.2.bias"])
    last = "output_layer."
    modulation = state[last + "adaLN_modulation.weight"] @ c
    shift, scale = (modulation + state[last + "adaLN_modulation.bias"]).split(hidden)
    scores = []
    for token, u in zip(tokens, x):
        inner = norm(u, "output_layer.norm_final") * (1 + scale) + shift
        score = state[last + "linear.weight"] @ inner + state[last + "linear.bias"]
        score = score - math.log(math.exp(sigma) - 1) - math.log(len(score) - 1)
        score[token] = 0
        scores.append(score)
    return torch.stack(scores)


def test_names_and_shapes_of_sedd_small() -> None:
    with torch.device("meta"):
        network = Sedd(sedd_settings(config()))
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == SMALL


def test_settings_of_published_configs() -> None:
    assert sedd_settings(config()) == SeddSettings()
    medium = sedd_settings(config(hidden_size=1024, n_blocks=24, n_heads=16))
    assert (medium.hidden, medium.blocks, medium.heads, medium.mask) == (1024, 24, 16, 50257)
    noisier = config() | {"noise": {"type": "geometric", "sigma_max": 20}}
    assert sedd_settings(noisier).largest_sigma == 20
    shorter = config() | {"noise": {"type": "loglinear", "eps": 0.1}}
    assert sedd_settings(shorter).largest_sigma == pytest.approx(math.log(10))
    assert is_sedd_config(config())
    assert not is_sedd_config({"model_type": "bert", "vocab_size": 3})


def test_configs_that_are_refused() -> None:
    with pytest.raises(InputError, match='graph "uniform"'):
        sedd_settings(config() | {"graph": {"type": "uniform"}})
    with pytest.raises(InputError, match='noise "cosine"'):
        sedd_settings(config() | {"noise": {"type": "cosine"}})
    with pytest.raises(InputError, match="no entry 'tokens'"):
        sedd_settings({k: v for k, v in config().items() if k != "tokens"})


@pytest.mark.parametrize("sigma", [0.01, 0.4, 3.0])
def test_network_agrees_with_a_naive_one(sigma: float) -> None:
    network, tokens = tiny().double(), some_tokens(2, 5)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        state = network.state_dict()
        expected = [naive(state, row, sigma, TINY.blocks, TINY.heads) for row in tokens.tolist()]
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        double = network(tokens, torch.full((2,), sigma, dtype=torch.float64))
        single = network.float()(tokens, torch.full((2,), sigma))
    torch.testing.assert_close(double, torch.stack(expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(single.double(), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_attention_sees_both_sides_and_places() -> None:
    network, sigma = tiny(), torch.tensor([1.0])
    tokens = torch.tensor([[1, 2, 3, 4, 7]])
    with torch.no_grad():
        before = network(tokens, sigma)[0]
        for changed, seen_from in ((0, 4), (4, 0)):
            other = tokens.clone()
            other[0, changed] = 5
            assert (network(other, sigma)[0, seen_from] - before[seen_from]).abs().max() > 1e-3
        swapped = network(tokens[:, [1, 0, 2, 3, 4]], sigma)[0]
        assert (swapped[4] - before[4]).abs().max() > 1e-3
    assert (before.gather(1, tokens[0].unsqueeze(1)) == 0).all()


def test_rows_and_sigmas_do_not_mix() -> None:
    network, tokens = tiny(), some_tokens(3, 6)
    sigma = torch.tensor([0.1, 1.0, 5.0])
    with torch.no_grad():
        together = network(tokens, sigma)
        alone = [network(tokens[i : i + 1], sigma[i : i + 1]) for i in range(3)]
        other = network(tokens, sigma.flip(0))
    torch.testing.assert_close(together, torch.cat(alone))
    assert (together[0] - other[0]).abs().max() > 1e-2


def test_without_scaling_by_sigma() -> None:
    """The subtracted term is that of a uniform guess: 1 / ((V - 1) (e^sigma - 1))."""
    network, tokens = tiny(), torch.full((1, 4), TINY.mask)
    plain = Sedd(SeddSettings(**{**vars(TINY), "scale_by_sigma": False})).eval()
    plain.load_state_dict(network.state_dict())
    sigma = torch.tensor([0.7])
    with torch.no_grad():
        difference = (plain(tokens, sigma) - network(tokens, sigma))[..., : TINY.mask]
    expected = math.log((math.exp(0.7) - 1) * 7)
    torch.testing.assert_close(difference, torch.full_like(difference, expected))


def test_sigma_of_a_level() -> None:
    """-log kept, and at level K, where nothing is kept, the most noise of training."""
    seen = []

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return x

    for schedule in (linear_masking(4), cosine_masking(4)):
        timed = AtLevel(network, schedule, LARGEST_SIGMA)  # type: ignore[arg-type]
        timed(torch.zeros(4, 1), torch.tensor([4, 1, 2, 3]), None)
        expected = [6.907755, *(-math.log(float(schedule.kept[k])) for k in (1, 2, 3))]
        assert seen.pop().tolist() == pytest.approx(expected)


class KnownScores(nn.Module):
    """The same log scores [V + 1] at every position."""

    def __init__(self, scores: Tensor):
        super().__init__()
        self.scores = scores

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.scores.expand(*x.shape, -1)


def test_conditionals_of_given_scores() -> None:
    """Score times e^sigma - 1 where that is normalised, and made so where it is not quite."""
    schedule, mask = linear_masking(4), 3
    level, x = torch.tensor([2]), torch.tensor([[mask]])
    pi = torch.tensor([0.5, 0.3, 0.2])
    factor = math.exp(-math.log(0.5)) - 1
    log_scores = torch.cat([(pi / factor).log(), torch.zeros(1)])
    for error in (0.0, 0.3):
        network = KnownScores(log_scores + error * torch.tensor([1.0, 1.0, 1.0, 0.0]))
        denoiser = score_denoiser(network, schedule, mask=mask, largest_sigma=LARGEST_SIGMA)
        law = denoiser(x, level, None)[0, 0].exp()
        torch.testing.assert_close(law, torch.cat([pi, torch.zeros(1)]))
    half = KnownScores(log_scores.bfloat16())
    denoiser = score_denoiser(half, schedule, mask=mask, largest_sigma=LARGEST_SIGMA)
    law = denoiser(x, level, None)
    assert law.dtype == torch.float32
    assert float(law.exp().sum()) == pytest.approx(1, abs=1e-6)


class TabularScores(nn.Module):
    """Exact log scores of a law p0 [V] * L, by summing over clean texts; V is the mask."""

    def __init__(self, p0: Tensor):
        super().__init__()
        self.p0, self.count = p0, p0.shape[0]

    def noisy(self, x: tuple[int, ...], sigma: float) -> Tensor:
        """p_sigma(x): a token stays with probability e^-sigma, is the mask otherwise."""
        keep = math.exp(-sigma)
        total = torch.zeros((), dtype=torch.float64)
        for clean in itertools.product(range(self.count), repeat=len(x)):
            each = [keep if a == b else (1 - keep) * (a == self.count) for a, b in zip(x, clean)]
            total = total + self.p0[clean] * math.prod(each)
        return total

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        rows = []
        for row, s in zip(x.tolist(), sigma.tolist()):
            whole = self.noisy(tuple(row), s)
            for i in range(len(row)):
                texts = ((*row[:i], v, *row[i + 1 :]) for v in range(self.count + 1))
                rows.append(torch.stack([(self.noisy(t, s) / whole).log() for t in texts]))
        return torch.stack(rows).reshape(*x.shape, self.count + 1)


@pytest.mark.parametrize("level", [1, 3, 5])
def test_exact_scores_give_exact_conditionals(level: int) -> None:
    """p(x0_i = v | tokens that are not masked), at every sigma, from enumeration of V^L texts."""
    generator = torch.Generator().manual_seed(3)
    p0 = torch.rand((3, 3, 3), generator=generator, dtype=torch.float64)
    p0, mask = p0 / p0.sum(), 3
    x = torch.tensor([[3, 3, 3], [3, 1, 3], [0, 3, 2]])
    denoiser = score_denoiser(
        TabularScores(p0), linear_masking(5), mask=mask, largest_sigma=LARGEST_SIGMA
    )
    law = denoiser(x, torch.full((3,), level), None).exp()
    for row, tokens in enumerate(x.tolist()):
        joint = p0[tuple(slice(t, t + 1) if t != mask else slice(None) for t in tokens)]
        for i in (i for i, token in enumerate(tokens) if token == mask):
            expected = joint.sum([j for j in range(3) if j != i]) / joint.sum()
            torch.testing.assert_close(law[row, i, :3], expected, rtol=1e-10, atol=1e-12)
            assert law[row, i, mask] == 0


def test_level_reaches_the_network() -> None:
    """And gradients come back to every parameter."""
    network = tiny()
    denoiser = score_denoiser(network, linear_masking(4), mask=7, largest_sigma=LARGEST_SIGMA)
    x = torch.tensor([[7, 2, 7, 4], [7, 2, 7, 4]])
    law = denoiser(x, torch.tensor([1, 4]), None)[..., :7]
    assert (law[0] - law[1]).abs().max() > 1e-3
    law[..., 0].sum().backward()
    assert all((p.grad is not None and p.grad.abs().max() > 0) for p in network.parameters())
