"""Q-learning whose backup looks at draws of the behaviour prior: the trainer of a `SoftCritic`."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rtb_rl.rl.soft_backup import Backup
from rtb_rl.rl.twin_q import bootstrapped, follow

if TYPE_CHECKING:
    from rtb_rl.rl.dataset import Transitions
    from rtb_rl.rl.soft_critic import SoftCritic


class SoftQLearning:
    """Trains a `SoftCritic` in place, one batch of transitions with draws of the prior at a time.

    V regresses on the values backed up at the next states, which are computed in any case; those of
    terminal states, where Q is never trained, are left out.
    """

    def __init__(
        self,
        critic: "SoftCritic",
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
