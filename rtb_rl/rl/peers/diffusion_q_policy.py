"""How Diffusion-QL acts: actions drawn from a diffusion, one kept by its Q (arXiv 2208.06193)."""

import torch
from torch import Generator, Tensor

from rtb_rl.core import Denoiser, GaussianDiffusion
from rtb_rl.rl.critics.critic import Critic


def draw_actions(
    diffusion: GaussianDiffusion, denoiser: Denoiser, observations: Tensor, *, generator: Generator
) -> Tensor:
    """An action in [-1, 1] a row, through which gradients flow back to the denoiser.

    observations [batch, observation size] -> [batch, action size]. Predicted clean actions are
    clipped to [-1, 1] at every level, as is what is drawn last.
    """
    x = diffusion.start(len(observations), generator=generator)
    for k in range(diffusion.levels, 0, -1):
        level = torch.full((len(x),), k, dtype=torch.int64, device=x.device)
        kernel = diffusion.kernel(denoiser(x, level, observations).clamp(-1, 1), x, level)
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = kernel.mean + kernel.std * noise
    return x.clamp(-1, 1)


def choose(q: Tensor, beta: float, *, generator: Generator) -> Tensor:
    """A column for each row of q [rows, candidates], drawn with softmax(beta q): int64 [rows]."""
    return torch.multinomial((beta * q).softmax(1), 1, generator=generator)[:, 0]


class DiffusionQPolicy:
    """Draws candidates from a diffusion and keeps one of them by the softmax of its Q.

    `action_low` and `action_high` [action size]: the environment's box, onto which [-1, 1] is
    mapped.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        denoiser: Denoiser,
        critic: Critic,
        *,
        candidates: int,
        beta: float,
        action_low: Tensor,
        action_high: Tensor,
    ):
        self.diffusion, self.denoiser, self.critic = diffusion, denoiser, critic
        self.candidates, self.beta = candidates, beta
        self.low, self.half_width = action_low, (action_high - action_low) / 2

    @property
    def device(self) -> torch.device:
        """Where it acts."""
        return self.low.device

    @torch.no_grad()
    def act(self, observations: Tensor, *, generator: Generator) -> Tensor:
        """One action a row, in the environment's units: [batch, action size]."""
        rows = len(observations)
        each = observations.repeat_interleave(self.candidates, dim=0)
        actions = draw_actions(self.diffusion, self.denoiser, each, generator=generator)
        q = self.critic.q(each, actions).reshape(rows, self.candidates)
        chosen = choose(q, self.beta, generator=generator)
        kept = actions.reshape(rows, self.candidates, -1)[torch.arange(rows), chosen]
        return self.low + (kept + 1) * self.half_width
