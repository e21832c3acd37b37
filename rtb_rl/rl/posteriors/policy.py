"""Policies that draw their actions from a diffusion."""

import torch
from torch import Generator, Tensor

from rtb_rl.core import Sampler
from rtb_rl.errors import InputError
from rtb_rl.rl.critics.critic import Critic


class DiffusionPolicy:
    """Acts by drawing from a sampler of actions given observations.

    With `candidates` > 1 it draws that many a row and takes the one the critic values most
    (arXiv 2304.10573). `action_low` and `action_high` [action size] are the environment's box, onto
    which [-1, 1] is mapped; draws beyond it are clipped.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        action_low: Tensor,
        action_high: Tensor,
        candidates: int = 1,
        critic: Critic | None = None,
    ):
        if candidates < 1:
            raise InputError(f"candidates is {candidates}; draw at least 1 action")
        if candidates > 1 and critic is None:
            raise InputError(f"choosing among {candidates} candidates needs a critic; give one")
        self.sampler = sampler
        self.candidates, self.critic = candidates, critic
        self.low, self.half_width = action_low, (action_high - action_low) / 2

    @property
    def device(self) -> torch.device:
        """Where it acts."""
        return self.low.device

    @torch.no_grad()
    def act(self, observations: Tensor, *, generator: Generator) -> Tensor:
        """One action a row: observations [batch, observation size] -> [batch, action size]."""
        actions = self.sampler.sample(observations, self.candidates, generator=generator)
        actions = self._choose(observations, actions.clamp(-1, 1))
        return self.low + (actions + 1) * self.half_width

    def _choose(self, observations: Tensor, actions: Tensor) -> Tensor:
        if self.candidates == 1 or self.critic is None:
            return actions[:, 0]
        each = observations.repeat_interleave(self.candidates, dim=0)
        q = self.critic.q(each, actions.flatten(0, 1)).reshape(len(observations), -1)
        return actions[torch.arange(len(actions), device=q.device), q.argmax(1)]
