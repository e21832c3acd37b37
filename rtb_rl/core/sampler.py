"""What a user holds as 'the prior' or 'the posterior'."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rtb_rl.core import conditions
from rtb_rl.core.protocols import Condition, Denoiser, Diffusion


@dataclass(frozen=True)
class Sampler:
    """A diffusion with a denoiser: draws final points."""

    diffusion: Diffusion
    denoiser: Denoiser

    @torch.no_grad()
    def sample(self, condition: Condition, n: int, *, generator: Generator) -> Tensor:
        """`n` draws for each row of the condition: [rows, n, *event]; without condition [n,
        *event].
        """
        rows = conditions.count(condition)
        each = conditions.repeat(condition, n) if n > 1 else condition
        x = self.diffusion.start(n * (rows or 1), generator=generator)
        for k in range(self.diffusion.levels, 0, -1):
            level = torch.full((x.shape[0],), k, dtype=torch.int64, device=x.device)
            x = self.diffusion.kernel(self.denoiser(x, level, each), x, level).sample(
                generator=generator
            )
        return x if rows is None else x.reshape(rows, n, *x.shape[1:])
