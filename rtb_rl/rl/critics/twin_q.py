"""Q networks that regress on their own slow copy: the critic inside TD3+BC and Diffusion-QL."""

import copy

import torch
from torch import Tensor, nn

from rtb_rl.nn.ensemble import EnsembleMLP
from rtb_rl.rl.critics.bootstrap import follow
from rtb_rl.rl.critics.critic import ObservationScaler


class TwinQ(nn.Module):
    """Two Q networks and a target copy of them that follows slowly (arXiv 1802.09477).

    Observations [batch, observation size] as the data set holds them, standardised once `scaler` is
    fitted; actions [batch, action size] in [-1, 1]; values in units of the rewards trained on.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        *,
        width: int = 256,
        depth: int = 2,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.scaler = ObservationScaler(observation_size, device=generator.device)
        self.network = EnsembleMLP(
            observation_size + action_size,
            1,
            members=2,
            width=width,
            depth=depth,
            generator=generator,
        )
        self.target = copy.deepcopy(self.network).requires_grad_(False)

    def both(self, observation: Tensor, action: Tensor) -> Tensor:
        """Q of the networks in training, [2, batch]."""
        return self.network(self._inputs(observation, action)).squeeze(-1)

    def both_targets(self, observation: Tensor, action: Tensor) -> Tensor:
        """Q of their slow copies, [2, batch]."""
        return self.target(self._inputs(observation, action)).squeeze(-1)

    def q(self, observation: Tensor, action: Tensor) -> Tensor:
        """The lesser of the slow copies, [batch]: what makes it a `Critic`."""
        return self.both_targets(observation, action).amin(0)

    def _inputs(self, observation: Tensor, action: Tensor) -> Tensor:
        return torch.cat([self.scaler(observation), action], dim=1)

    def follow(self, polyak: float) -> None:
        """target <- target + polyak (network - target)."""
        follow(self.target, self.network, polyak)
