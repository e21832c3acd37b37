"""Laws of one denoising step that draw and score from the same numbers."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from rtb_rl.core.on_demand import OnDemandLogProbs
from rtb_rl.core.reveals import RevealLaw


@dataclass(frozen=True)
class GaussianKernel:
    """N(mean, std^2), independent coordinates.

    `mean`: [batch, *event]; `std`: positive, broadcastable to it. Spreads are checked once, where a
    diffusion is built.
    """

    mean: Tensor
    std: Tensor

    @torch.no_grad()
    def sample(self, *, generator: Generator) -> Tensor:
        """One draw a row, without graph."""
        mean = self.mean
        eps = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return torch.addcmul(mean, self.std, eps)

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mean, std^2), nats: [batch]."""
        mean, x, std = _at_least_float32(self.mean, x, self.std)
        z = (x - mean) / std
        terms = z.square() / 2 + (std.log() + math.log(2 * math.pi) / 2)
        return -terms.flatten(1).sum(1)

    def log_ratio(self, other: "GaussianKernel", x: Tensor) -> Tensor:
        """log p_self(x) - log p_other(x), nats: [batch].

        (m - m') . (x - (m + m') / 2) / s^2 for one spread s: no two large numbers are subtracted.
        Spreads that differ add their own term, written with log1p so that it too vanishes smoothly.
        """
        mean, reference, x, std, wide = _at_least_float32(
            self.mean, other.mean, x, self.std, other.std
        )
        excess = (std - wide) * (std + wide) / wide.square()  # s^2 / s'^2 - 1
        shift = (mean - reference) * (x - (mean + reference) / 2) / wide.square()
        spread = ((x - mean) / std).square() * excess / 2 - torch.log1p(excess) / 2
        return (shift + spread).flatten(1).sum(1)

    def widened(self, factor: float) -> "GaussianKernel":
        """`factor` times the spread."""
        return GaussianKernel(self.mean, self.std * factor)


@dataclass(frozen=True)
class UnmaskingKernel:
    """Reveals some of the masked tokens of `x`; the law of each depends on nothing but `log_probs`.

    `log_probs`: [batch, length, V], normalised over V, -inf allowed, none for the mask, or the same
    on demand; `x`: int64
    [batch, length] at `level` [batch]. `reveals` says which positions, `shift` [batch, length] how
    a denoiser changes the log-odds of that.
    """

    log_probs: Tensor | OnDemandLogProbs
    x: Tensor
    level: Tensor
    mask: int
    reveals: RevealLaw
    shift: Tensor | None = None

    @torch.no_grad()
    def sample(self, *, generator: Generator) -> Tensor:
        """One draw a row, without graph. ValueError where the mask itself is drawn."""
        masked = self.x == self.mask
        revealed = self.reveals.draw(masked, self.level, self.shift, generator=generator)
        tokens = exponential_race(self.log_probs[revealed], generator=generator)
        if bool((tokens == self.mask).any()):
            raise ValueError(
                f"token {self.mask}, the mask, was drawn for a revealed position; a denoiser must"
                " give it no probability: wrap a network of logits in TokenLogits"
            )
        x = self.x.clone()
        x[revealed] = tokens
        return x

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), nats: [batch]; -inf where a token that was not masked has changed."""
        masked = self.x == self.mask
        revealed = masked & (x != self.mask)
        tokens = token_log_probs(self.log_probs, x, revealed).sum(1)
        total = tokens + self._log_reveal(revealed, masked).to(tokens.dtype)
        return total.masked_fill(~((x == self.x) | masked).all(1), -torch.inf)

    def log_ratio(self, other: "UnmaskingKernel", x: Tensor) -> Tensor:
        """log p_self(x) - log p_other(x), nats: [batch], for an x that can follow.

        Only the positions revealed in this step count, one term each. Their choice has one law for
        both and cancels, unless a denoiser shifts it. NaN where a revealed token is impossible
        under both.
        """
        masked = self.x == self.mask
        revealed = masked & (x != self.mask)
        terms = token_log_probs(self.log_probs, x, revealed)
        ratio = (terms - token_log_probs(other.log_probs, x, revealed)).sum(1)
        if self.shift is None and other.shift is None:
            return ratio
        shifted = self._log_reveal(revealed, masked) - other._log_reveal(revealed, masked)
        return ratio + shifted.to(ratio.dtype)

    def widened(self, factor: float) -> "UnmaskingKernel":
        """`factor` times the temperature of the tokens; positions are revealed as before."""
        if isinstance(self.log_probs, OnDemandLogProbs):
            return replace(self, log_probs=self.log_probs.tempered(factor))
        return replace(self, log_probs=(self.log_probs / factor).log_softmax(-1))

    def _log_reveal(self, revealed: Tensor, masked: Tensor) -> Tensor:
        return self.reveals.log_prob(revealed, masked, self.level, self.shift)


def token_log_probs(log_probs: Tensor | OnDemandLogProbs, tokens: Tensor, chosen: Tensor) -> Tensor:
    """The log-probability of each token where `chosen`, zero elsewhere: [batch, length].

    Float32 or better. Gathered before any arithmetic, so that -inf at tokens not taken reaches
    neither value nor gradient.
    """
    if isinstance(log_probs, OnDemandLogProbs):
        taken = log_probs[chosen].gather(-1, tokens[chosen].unsqueeze(-1)).squeeze(-1)
        (taken,) = _at_least_float32(taken)
        return taken.new_zeros(chosen.shape).index_put(chosen.nonzero(as_tuple=True), taken)
    index = torch.where(chosen, tokens, 0).unsqueeze(-1)
    (taken,) = _at_least_float32(log_probs.gather(-1, index).squeeze(-1))
    return torch.where(chosen, taken, 0.0)


def exponential_race(log_probs: Tensor, *, generator: Generator) -> Tensor:
    """Draws of the tokens of `log_probs` [n, V]: int64 [n].

    The first arrival of exponentials with rates p, as argmax of log p - log E in float64: a uniform
    number in float32 is a multiple of 6e-8, so that rarer tokens would be drawn too often or never.
    ValueError for NaN, which would be drawn as token 0.
    """
    uniform = torch.rand(
        log_probs.shape, generator=generator, device=log_probs.device, dtype=torch.float64
    )
    arrival = uniform.clamp_(min=2.0**-54).neg_().log1p_().neg_()  # never 0, whose log is -inf
    drawn = (log_probs - arrival.log_()).argmax(-1)
    if bool(log_probs.gather(-1, drawn.unsqueeze(-1)).isnan().any()):  # NaN is argmax's largest
        raise ValueError("the denoiser returned NaN for the log-probabilities of tokens")
    return drawn


def _at_least_float32(*tensors: Tensor) -> list[Tensor]:
    return [t if t.dtype in (torch.float32, torch.float64) else t.float() for t in tensors]
