"""Implicit Q-learning: a critic from the actions in the data alone (arXiv 2110.06169, eqs 5-6)."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rtb_rl.errors import InputError
from rtb_rl.rl.critics.bootstrap import bootstrapped, follow
from rtb_rl.rl.critics.critic import IQLCritic

if TYPE_CHECKING:
    from rtb_rl.rl.data.dataset import Transitions


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """mean |expectile - 1(difference < 0)| difference^2 over a batch (arXiv 2110.06169, eq. 4).

    With difference = sample - m, the minimising m is the mean of the samples at expectile 0.5 and
    tends to their largest as expectile tends to 1.
    """
    weight = torch.where(difference < 0, 1.0 - expectile, expectile)
    return (weight * difference.square()).mean()


class IQL:
    """Trains an `IQLCritic` in place, one batch of transitions at a time.

    V regresses with `expectile` on the minimum of the target ensemble (eq. 5); every member of Q
    regresses on reward + discount * V(next observation) (eq. 6), where V counts as zero after a
    terminal step and as usual after a truncated one. Both losses are taken at the same parameters
    and descended by one Adam. Afterwards the target moves by the fraction `polyak` towards Q.
    """

    def __init__(
        self,
        critic: IQLCritic,
        *,
        discount: float = 0.99,
        expectile: float = 0.7,
        polyak: float = 0.005,
        learning_rate: float = 3e-4,
    ) -> None:
        _require("discount", discount, 0.0 <= discount <= 1.0, "0 <= discount <= 1")
        _require("expectile", expectile, 0.0 < expectile < 1.0, "0 < expectile < 1")
        _require("polyak", polyak, 0.0 < polyak <= 1.0, "0 < polyak <= 1")
        _require("learning_rate", learning_rate, learning_rate > 0.0, "learning_rate > 0")
        self.critic = critic
        self.target = copy.deepcopy(critic.q_network).requires_grad_(False)
        self.discount = discount
        self.expectile = expectile
        self.polyak = polyak
        self.optimiser = torch.optim.Adam(critic.parameters(), lr=learning_rate, fused=True)

    def update(self, batch: "Transitions") -> dict[str, Tensor]:
        """One gradient step; returns detached scalars and waits for no device."""
        loss, metrics = self._loss(batch)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        follow(self.target, self.critic.q_network, self.polyak)
        return metrics

    def _loss(self, batch: "Transitions") -> tuple[Tensor, dict[str, Tensor]]:
        critic = self.critic
        observation = critic.scaler(batch.observations)
        inputs = torch.cat([observation, batch.actions], dim=1)
        with torch.no_grad():
            target_q = self.target(inputs).squeeze(-1).amin(dim=0)
            backup = bootstrapped(batch, critic.v(batch.next_observations), self.discount)
        value = critic.v_network(observation).flatten()
        q = critic.q_network(inputs).squeeze(-1)
        advantage = target_q - value
        v_loss = expectile_loss(advantage, self.expectile)
        q_loss = (q - backup).square().mean()
        metrics = {
            "critic/q_loss": q_loss,
            "critic/v_loss": v_loss,
            "critic/q_mean": target_q.mean(),
            "critic/v_mean": value.mean(),
            "critic/advantage_mean": advantage.mean(),
        }
        # No parameter is shared, and each member of Q has its own: scaling the mean over members
        # by their number gives every member the gradient it would have alone.
        loss = v_loss + len(q) * q_loss
        return loss, {name: metric.detach() for name, metric in metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        """Critic, target and optimiser: what an exact resume needs."""
        return {
            "critic": self.critic.state_dict(),
            "target": self.target.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, into a critic of the same sizes."""
        self.critic.load_state_dict(state["critic"])
        self.target.load_state_dict(state["target"])
        self.optimiser.load_state_dict(state["optimiser"])


def _require(name: str, value: float, holds: bool, condition: str) -> None:
    if not holds:
        raise InputError(f"IQL got {name}={value}, it needs {condition}; correct the setting")
