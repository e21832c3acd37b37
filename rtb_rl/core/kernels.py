"""Laws of one denoising step that draw and score from the same numbers."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


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


def _at_least_float32(*tensors: Tensor) -> list[Tensor]:
    return [t if t.dtype in (torch.float32, torch.float64) else t.float() for t in tensors]
