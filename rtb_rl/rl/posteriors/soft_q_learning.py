"""Q-learning whose backup looks at draws of the behaviour prior: a `SoftCritic` and its trainer."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn

from rtb_rl.nn import EnsembleMLP
from rtb_rl.rl.critics.bootstrap import bootstrapped, follow
from rtb_rl.rl.critics.critic import ObservationScaler
from rtb_rl.rl.posteriors.soft_backup import Backup, Bound, least

if TYPE_CHECKING:
    from rtb_rl.rl.data.dataset import Transitions


class SoftCritic(nn.Module):
    """An ensemble of Q with a slow copy, read through a lower bound, and a network of V.

    Observations [batch, observation size] as the data set holds them, actions [batch, action size]
    in [-1, 1]; values [batch] in units of the rewards trained on.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        *,
        bound: Bound = least,
        members: int = 2,
        width: int = 256,
        depth: int = 2,
        layer_norm: bool = False,
        generator: Generator,
    ):
        super().__init__()
        self.bound = bound
        self.scaler = ObservationScaler(observation_size, device=generator.device)
        self.network = EnsembleMLP(
            observation_size + action_size,
            1,
            members=members,
            width=width,
            depth=depth,
            layer_norm=layer_norm,
            generator=generator,
        )
        self.target = copy.deepcopy(self.network).requires_grad_(False)
        self.v_network = EnsembleMLP(
            observation_size, 1, members=1, width=width, depth=depth, generator=generator
        )

    def members(self, observation: Tensor, action: Tensor) -> Tensor:
        """Q of the networks in training, [members, batch]."""
        return self.network(self._inputs(observation, action)).squeeze(-1)

    def q(self, observation: Tensor, action: Tensor) -> Tensor:
        """The lower bound of the slow copies, [batch]."""
        return self.bound(self.target(self._inputs(observation, action)).squeeze(-1))

    def v(self, observation: Tensor) -> Tensor:
        """The value that the backup gives the state, [batch].

        With `soft_value` of the same beta it is log Z(s) / beta, so that log r = Q - V has a log
        Z(s) near 0.
        """
        return self.v_network(self.scaler(observation)).flatten()

    def _inputs(self, observation: Tensor, action: Tensor) -> Tensor:
        return torch.cat([self.scaler(observation), action], dim=1)


class SoftQLearning:
    """Trains a `SoftCritic` in place, one batch of transitions with draws of the prior at a time.

    V regresses on the values backed up at the next states, which are computed in any case; those of
    terminal states, where Q is never trained, are left out.
    """

    def __init__(
        self,
        critic: SoftCritic,
        *,
        backup: Backup,
        discount: float = 0.99,
        polyak: float = 0.005,
        learning_rate: float = 3e-4,
    ):
        self.critic, self.backup = critic, backup
        self.discount, self.polyak = discount, polyak
        trained = [p for p in critic.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(trained, lr=learning_rate, fused=True)

    @torch.no_grad()
    def next_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """V of states [batch, d_o] from M actions each, [batch, M, d_a] clipped: [batch]."""
        rows, count, _ = actions.shape
        each = observations.repeat_interleave(count, 0)
        q = self.critic.q(each, actions.flatten(0, 1).clamp(-1, 1))
        return self.backup(q.reshape(rows, count))

    def update(self, batch: "Transitions", next_actions: Tensor) -> dict[str, Tensor]:
        """One gradient step; `next_actions` [batch, M, d_a] are draws at the next states."""
        critic = self.critic
        next_value = self.next_values(batch.next_observations, next_actions)
        goal = bootstrapped(batch, next_value, self.discount)
        q = critic.members(batch.observations, batch.actions)
        q_loss = (q - goal).square().mean(1).sum()
        error = critic.v(batch.next_observations) - next_value
        v_loss = error.masked_fill(batch.terminated, 0.0).square().mean()
        self.optimiser.zero_grad(set_to_none=True)
        (q_loss + v_loss).backward()
        self.optimiser.step()
        follow(critic.target, critic.network, self.polyak)
        return {
            "soft_critic/q_loss": q_loss.detach(),
            "soft_critic/v_loss": v_loss.detach(),
            "soft_critic/q_mean": q.detach().mean(),
            "soft_critic/v_mean": next_value.mean(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Critic and optimiser: what an exact resume needs."""
        return {"critic": self.critic.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, into a critic of the same sizes."""
        self.critic.load_state_dict(state["critic"])
        self.optimiser.load_state_dict(state["optimiser"])
