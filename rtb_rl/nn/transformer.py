"""Small transformers of tokens: one that sees all of a sequence, one that sees what came before."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from rtb_rl.core.protocols import Condition
from rtb_rl.nn.initial import initialise

ROTATION_BASE = 10_000.0
GATE_SCALE = 30.0  # a gate moves faster than weights do, at one learning rate

Mask = Callable[[Tensor], Tensor]
"""Which positions see which: bool, broadcastable to [batch, heads, length, length]."""


class MaskedTransformer(nn.Module):
    """Logits of masked diffusion: (x [batch, length], level, condition) -> [batch, length, V].

    Every position sees every other one, but padding. Without time input: which tokens are masked
    says it all (arXiv 2406.07524 section 3). With a `precision` the blocks are evaluated in it, and
    the logits in that of the weights. With `positions` every column up to that many has a learned
    embedding: rotary attention knows how far away it looks but doesn't pass it on, and what a gap
    is made of can depend on how far the nearest token is.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        pad: int,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        positions: int = 0,
        precision: torch.dtype | None = None,
        generator: Generator,
    ):
        super().__init__()
        shape = (vocabulary, width, depth, heads, positions)
        self.pad = pad
        self.trunk = _Trunk(shape, lambda x: (x != pad)[:, None, None], precision, generator)
        self.bias = nn.Parameter(torch.zeros(vocabulary, device=generator.device))

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        return self.logits(self.features(x), x.shape[1])

    def at(self, x: Tensor, level: Tensor, condition: Condition, row: Tensor, place: Tensor):
        """Logits at the places (row, place) alone, which must not be padding: [n, V]."""
        return self.logits(self.features(x)[row, place])

    def features(
        self, x: Tensor, faded: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        """Of the columns that are not padding in every row: [batch, columns, width].

        `faded`: bool [batch, length], what other positions see by `gate` [blocks, heads, 1, 1].
        """
        filled = (x != self.pad).any(0).nonzero()
        end = int(filled[-1]) + 1 if len(filled) else 1
        return self.trunk(x[:, :end], None if faded is None else faded[:, :end], gate)

    def logits(self, features: Tensor, length: int | None = None) -> Tensor:
        """Logits of features; zeros up to `length` columns."""
        logits = functional.linear(features, self.trunk.tokens.weight, self.bias)
        missing = 0 if length is None else length - logits.shape[1]
        return functional.pad(logits, (0, 0, 0, missing)) if missing else logits


class GatedTransformer(nn.Module):
    """A MaskedTransformer to which part of the sequence, `condition["right"]`, fades in.

    Other positions attend by (1 - gate) * softmax without it + gate * softmax with it, a learned
    gate for each block and head: zero at first, where the network is the one that is not shown that
    part; with gates of one it is the network that is shown everything.
    """

    def __init__(self, network: MaskedTransformer):
        super().__init__()
        self.network = network
        trunk = network.trunk
        gates = (len(trunk.blocks), trunk.heads)
        self.gate = nn.Parameter(torch.zeros(gates, device=network.bias.device))

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        return self.network.logits(self._features(x, condition), x.shape[1])

    def at(self, x: Tensor, level: Tensor, condition: Condition, row: Tensor, place: Tensor):
        """Logits at the places (row, place) alone: [n, V]."""
        return self.network.logits(self._features(x, condition)[row, place])

    def _features(self, x: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, dict)
        gate = (GATE_SCALE * self.gate)[:, :, None, None]
        return self.network.features(x, condition["right"], gate)


class CausalTransformer(nn.Module):
    """Tokens [batch, length] -> logits of the token after each: [batch, length, V]."""

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        precision: torch.dtype | None = None,
        generator: Generator,
    ):
        super().__init__()
        self.trunk = _Trunk((vocabulary, width, depth, heads, 0), _causal, precision, generator)
        self.bias = nn.Parameter(torch.zeros(vocabulary, device=generator.device))

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.linear(self.trunk(tokens), self.trunk.tokens.weight, self.bias)

    def at(self, tokens: Tensor, row: Tensor, place: Tensor) -> Tensor:
        """Logits of the token after the places (row, place): [n, V]."""
        features = self.trunk(tokens)[row, place]
        return functional.linear(features, self.trunk.tokens.weight, self.bias)


class _Trunk(nn.Module):
    """Tokens -> features [batch, length, width], ready for a product with the token table."""

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        mask: Mask,
        precision: torch.dtype | None,
        generator: Generator,
    ):
        super().__init__()
        vocabulary, width, depth, heads, positions = shape
        self.mask, self.precision, self.heads = mask, precision, heads
        self.tokens = nn.Embedding(vocabulary, width, _weight=_table(vocabulary, width, generator))
        self.blocks = nn.ModuleList([_Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.to(generator.device)
        initialise(self.blocks, generator=generator)
        self._calm()
        self.places = _table(positions, width, generator) if positions else None

    def _calm(self) -> None:
        """Shrink what the blocks add, so that their sum is of order one."""
        with torch.no_grad():
            for name, weight in self.blocks.named_parameters():
                if name.endswith(("attended.weight", "last.weight")):
                    weight.mul_((2 * len(self.blocks)) ** -0.5)

    def forward(
        self, tokens: Tensor, faded: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        width, length = self.tokens.embedding_dim, tokens.shape[1]
        x, seen = self.tokens(tokens), self.mask(tokens)
        if self.places is not None:
            if length > len(self.places):
                raise ValueError(
                    f"{length} columns of tokens, but the network was built with positions ="
                    f" {len(self.places)}; build it for the longest sequence"
                )
            x = x + self.places[:length]
        x = x * width**0.5
        dtype = self.precision or x.dtype
        turn = _rotation(length, width // self.heads, tokens.device, dtype)
        with torch.autocast(tokens.device.type, dtype, enabled=self.precision is not None):
            if faded is None or gate is None:
                for block in self.blocks:
                    x = block(x, seen, turn)
            else:
                without = seen & (faded[:, :, None] | ~faded[:, None])[:, None]
                for block, share in zip(self.blocks, gate.to(dtype), strict=True):
                    x = block(x, (without, seen), turn, share)
        return self.norm(x)


def _table(rows: int, width: int, generator: Generator) -> nn.Parameter:
    """Embeddings [rows, width] of length about 1."""
    drawn = torch.empty(rows, width, device=generator.device)
    return nn.Parameter(drawn.normal_(std=width**-0.5, generator=generator))


class _Block(nn.Module):
    """Attention, then a hidden layer, each added to what came in (pre-norm)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.head = heads, width // heads
        self.before_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width)
        self.before_hidden = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 4 * width)
        self.last = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, seen: Any, turn: tuple[Tensor, Tensor], share: Any = None):
        batch, length, width = x.shape
        joint = self.query_key_value(self.before_attention(x))
        q, k, v = joint.view(batch, length, 3, self.heads, self.head).permute(2, 0, 3, 1, 4)
        q, k = _turned(q, turn), _turned(k, turn)
        found = _attention(q, k, v, seen) if share is None else _mixed(q, k, v, seen, share)
        x = x + self.attended(found.transpose(1, 2).reshape(batch, length, width))
        return x + self.last(functional.gelu(self.hidden(self.before_hidden(x))))


def _attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head)) v over what is seen: [batch, heads, length, head]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # there torch's takes four times as
        return _weights(q, k, seen) @ v  # long, backward pass included
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def _mixed(q: Tensor, k: Tensor, v: Tensor, seen: Sequence[Tensor], share: Tensor) -> Tensor:
    """Attention that is (1 - share) over what the first mask shows and `share` over the second."""
    first, second = (_weights(q, k, shown) for shown in seen)
    return (first + share * (second - first)) @ v


def _weights(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    least = torch.finfo(scores.dtype).min  # finite: a row that sees nothing is not NaN
    return scores.masked_fill(~seen, least).softmax(-1)


def _causal(tokens: Tensor) -> Tensor:
    length = tokens.shape[1]
    return torch.ones((length, length), dtype=torch.bool, device=tokens.device).tril()


def _rotation(
    length: int, head: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head / 2] of rotary positions (arXiv 2104.09864)."""
    half = torch.arange(head // 2, device=device, dtype=torch.float32)
    angle = torch.arange(length, device=device)[:, None] * ROTATION_BASE ** (-2 * half / head)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = turn
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
