"""SEDD (arXiv 2310.16834) without flash-attn: its network, and its scores as a Denoiser.

The parameters have the names and shapes of the published checkpoints (louaaron/sedd-small and
sedd-medium), which therefore load as they are; attention is torch's own, on any device. Read one
with `rtb_rl.adapters.masked_lm.load_masked_lm`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtb_rl.core import MaskingSchedule, TokenLogits
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError

FREQUENCIES = 256  # size of the embedding of sigma
LARGEST_SIGMA = -math.log(1e-3)  # log-linear noise keeps a share of 1e-3 at its end


@dataclass(frozen=True)
class SeddSettings:
    """Sizes of the network; the defaults are those of sedd-small.

    `tokens` counts those of the text, without the mask, which is the next id. `length` is the
    longest sequence it was trained on, `largest_sigma` the most noise.
    """

    tokens: int = 50257
    hidden: int = 768
    blocks: int = 12
    heads: int = 12
    condition: int = 128
    length: int = 1024
    scale_by_sigma: bool = True
    largest_sigma: float = LARGEST_SIGMA

    @property
    def mask(self) -> int:
        return self.tokens


def is_sedd_config(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of SEDD's, which names no model type."""
    model = config.get("model")
    return "graph" in config and isinstance(model, Mapping) and "n_blocks" in model


def sedd_settings(config: Mapping[str, Any]) -> SeddSettings:
    """The settings in a config.json of SEDD. Raises InputError for one that isn't masked diffusion,
    for unknown noise, and for a missing entry.
    """
    try:
        model, noise, graph = config["model"], config["noise"], config["graph"]["type"]
        largest = {
            "loglinear": -math.log(noise["eps"]) if "eps" in noise else LARGEST_SIGMA,
            "geometric": float(noise.get("sigma_max", 1.0)),
        }
        if graph != "absorb" or noise["type"] not in largest:
            raise InputError(
                f'this SEDD has graph "{graph}" and noise "{noise["type"]}"; masked diffusion needs'
                ' graph "absorb" with noise "loglinear" or "geometric", as louaaron/sedd-small has'
            )
        return SeddSettings(
            tokens=config["tokens"],
            hidden=model["hidden_size"],
            blocks=model["n_blocks"],
            heads=model["n_heads"],
            condition=model["cond_dim"],
            length=model["length"],
            scale_by_sigma=model["scale_by_sigma"],
            largest_sigma=largest[noise["type"]],
        )
    except KeyError as error:
        raise InputError(
            f"SEDD's config.json has no entry {error}; take the file that was published with the"
            " weights"
        ) from error


class AtLevel(nn.Module):
    """A network (tokens, sigma [batch]) as a function of the level: sigma = -log(share kept).

    At most `largest_sigma`: level K keeps nothing, which is infinite sigma, while a network was
    trained up to a finite one (LARGEST_SIGMA for log-linear noise).
    """

    sigma: Tensor

    def __init__(self, network: nn.Module, schedule: MaskingSchedule, largest_sigma: float):
        super().__init__()
        self.network = network
        sigma = (-schedule.kept.log()).clamp(max=largest_sigma)
        self.register_buffer("sigma", sigma, persistent=False)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        return self.network(x, self.sigma[level])


def score_denoiser(
    network: nn.Module, schedule: MaskingSchedule, *, mask: int, largest_sigma: float
) -> nn.Module:
    """pi(v) = score_v (e^sigma - 1) at masked positions, normalised over all tokens but the mask.

    `network(tokens, sigma)` returns log scores, log p_sigma(x with v at i) / p_sigma(x). Of an
    exact one these are the conditionals of the clean token; a trained one is normalised only
    roughly. The factor e^sigma - 1 is the same for every v, so that normalising removes it.
    arXiv 2310.16834 section 4.
    """
    return TokenLogits(AtLevel(network, schedule, largest_sigma), mask)


class Sedd(nn.Module):
    """Log scores of every token at every position, log p(x with v at i) / p(x): [batch, length,
    tokens + 1], 0 for the token that is there.

    A bidirectional transformer with rotary positions, modulated by sigma (adaptive layer norm,
    arXiv 2212.09748). Without dropout: a denoiser is deterministic.
    """

    def __init__(self, settings: SeddSettings):
        super().__init__()
        hidden, condition, width = settings.hidden, settings.condition, settings.tokens + 1
        self.settings = settings
        self.vocab_embed = _Embedding(width, hidden)
        self.sigma_map = _SigmaEmbedding(condition)
        self.rotary_emb = _Rotary(hidden // settings.heads)
        self.blocks = nn.ModuleList(
            _Block(hidden, settings.heads, condition) for _ in range(settings.blocks)
        )
        self.output_layer = _Output(hidden, width, condition)

    def forward(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        """`tokens`: int64 [batch, length]; `sigma`: [batch], above 0."""
        condition = functional.silu(self.sigma_map(sigma))
        rotation = self.rotary_emb(tokens.shape[1])
        x = self.vocab_embed(tokens)
        for block in self.blocks:
            x = block(x, rotation, condition)
        scores = self.output_layer(x, condition)
        if self.settings.scale_by_sigma:
            # The uniform guess, 1 / (tokens (e^sigma - 1)), so that the layers need not learn it.
            guess = sigma.expm1().log() + math.log(self.settings.tokens)
            scores = scores - guess.to(scores.dtype).reshape(-1, 1, 1)
        return scores.scatter(-1, tokens.unsqueeze(-1), 0.0)


class _Embedding(nn.Module):
    """Zero until weights are loaded."""

    def __init__(self, count: int, size: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(count, size))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding[tokens]


class _SigmaEmbedding(nn.Module):
    """Cosines and sines of sigma at 128 frequencies from 1 to 1e-4, and two layers: [batch, size].

    Sigma itself is the time, never scaled.
    """

    def __init__(self, size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, sigma: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        place = torch.arange(half, dtype=sigma.dtype, device=sigma.device) / half
        angle = sigma.unsqueeze(1) * (-math.log(10_000) * place).exp()
        waves = torch.cat([angle.cos(), angle.sin()], 1)
        return self.mlp(waves.to(next(self.parameters()).dtype))


class _Rotary(nn.Module):
    """Cosines and sines of the angle position * frequency, each [length, size], halves alike.

    arXiv 2104.09864, with the dimensions i and i + size / 2 as one pair.
    """

    inv_freq: Tensor

    def __init__(self, size: int):
        super().__init__()
        exponent = torch.arange(0, size, 2, dtype=torch.float32) / size
        self.register_buffer("inv_freq", 10_000.0**-exponent)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        frequency = self.inv_freq
        place = torch.arange(length, dtype=frequency.dtype, device=frequency.device)
        angle = torch.outer(place, frequency).repeat(1, 2)
        return angle.cos(), angle.sin()


class _Block(nn.Module):
    """Attention and a two-layer network, each modulated by the condition and gated."""

    def __init__(self, size: int, heads: int, condition: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(size, bias=False)
        self.attn_qkv = nn.Linear(size, 3 * size, bias=False)
        self.attn_out = nn.Linear(size, size, bias=False)
        self.norm2 = nn.LayerNorm(size, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(size, 4 * size), nn.GELU(approximate="tanh"), nn.Linear(4 * size, size)
        )
        self.adaLN_modulation = _zero(nn.Linear(condition, 6 * size))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition).unsqueeze(1).chunk(6, -1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x = x + gate * self._attention(self.norm1(x) * (1 + scale) + shift, rotation)
        return x + mlp_gate * self.mlp(self.norm2(x) * (1 + mlp_scale) + mlp_shift)

    def _attention(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        separate = self.attn_qkv(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = separate.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, size]
        query, key = _rotated(query, rotation), _rotated(key, rotation)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.attn_out(mixed.transpose(1, 2).flatten(2))


class _Output(nn.Module):
    def __init__(self, size: int, count: int, condition: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(size, bias=False)
        self.linear = _zero(nn.Linear(size, count))
        self.adaLN_modulation = _zero(nn.Linear(condition, 2 * size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).unsqueeze(1).chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = rotation
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
