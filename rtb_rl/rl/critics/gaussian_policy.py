"""A Gaussian policy learnt by advantage-weighted regression (arXiv 2110.06169, eq. 7)."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rtb_rl.errors import InputError
from rtb_rl.nn.ensemble import EnsembleMLP
from rtb_rl.rl.critics.critic import ObservationScaler, ValueCritic
from rtb_rl.rl.episodes.action_box import to_box

if TYPE_CHECKING:
    from rtb_rl.rl.data.dataset import Transitions

LOG_STD_RANGE = (-5.0, 2.0)
LARGEST_WEIGHT = 100.0


class GaussianPolicy(nn.Module):
    """a ~ N(tanh(network(s)), std^2) in [-1, 1] units; std per coordinate, the same in all states.

    `action_low` and `action_high` [action size] are the box of the environment, onto which [-1, 1]
    is mapped. Observations are taken as they are until `standardise` is called.
    """

    action_low: Tensor
    action_high: Tensor

    def __init__(
        self,
        observation_size: int,
        *,
        action_low: Tensor,
        action_high: Tensor,
        width: int = 256,
        depth: int = 2,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        _check_box(action_low, action_high)
        device = generator.device
        action_size = len(action_low)
        self.scaler = ObservationScaler(observation_size, device=device)
        self.network = EnsembleMLP(
            observation_size, action_size, members=1, width=width, depth=depth, generator=generator
        )
        self.log_std = nn.Parameter(torch.zeros(action_size, device=device))
        self.register_buffer("action_low", action_low.detach().to(device, torch.float32))
        self.register_buffer("action_high", action_high.detach().to(device, torch.float32))

    def standardise(self, observations: Tensor) -> None:
        """Standardise inputs by the mean and std of a data set's observations [n, size]."""
        self.scaler.fit(observations)

    def mean(self, observation: Tensor) -> Tensor:
        """Mean action in [-1, 1], [batch, action size]."""
        return torch.tanh(self.network(self.scaler(observation))[0])

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """log density of action in [-1, 1], nats, [batch]; the Gaussian is not cut at the box."""
        deviation = (action - self.mean(observation)) * torch.exp(-self.log_std)
        constant = self.log_std.sum() + 0.5 * len(self.log_std) * math.log(2.0 * math.pi)
        return -0.5 * deviation.square().sum(dim=1) - constant

    @torch.no_grad()
    def act(self, observations: Tensor, *, generator: torch.Generator) -> Tensor:
        """A drawn action per row, clipped to the box, in environment units."""
        mean = self.mean(observations)
        noise = torch.randn(
            mean.shape, generator=generator, device=generator.device, dtype=mean.dtype
        )
        action = (mean + noise.to(mean.device) * self.log_std.exp()).clamp(-1.0, 1.0)
        return to_box(action, self.action_low, self.action_high)

    @torch.no_grad()
    def mean_action(self, observations: Tensor) -> Tensor:
        """The mean action per row, in environment units."""
        return to_box(self.mean(observations), self.action_low, self.action_high)


class MeanActionPolicy:
    """A policy that always takes the mean action of a `GaussianPolicy`: IQL as it is evaluated."""

    def __init__(self, policy: GaussianPolicy) -> None:
        self.policy = policy

    @property
    def device(self) -> torch.device:
        """Where it acts."""
        return self.policy.action_low.device

    def act(self, observations: Tensor, *, generator: torch.Generator) -> Tensor:
        """The mean action per row, in environment units; nothing is drawn from `generator`."""
        return self.policy.mean_action(observations)


class AdvantageWeightedRegression:
    """Trains a `GaussianPolicy` to maximise E[w log pi(a given s)] over the data (eq. 7).

    w = min(exp(temperature * (q - v)), 100), so `temperature` is in units of one over the rewards
    that the critic was trained on; 3 suits returns scaled to a range of 1000. The critic stays as
    it is. With `num_updates` the learning rate falls to zero along a cosine over that many updates,
    as published; without, it is constant. log std is kept in [-5, 2] by projection.
    """

    def __init__(
        self,
        policy: GaussianPolicy,
        critic: ValueCritic,
        *,
        temperature: float = 3.0,
        learning_rate: float = 3e-4,
        num_updates: int | None = None,
    ) -> None:
        if not callable(getattr(critic, "v", None)):
            raise InputError(
                f"advantage weighting needs critic.v(observation), {type(critic).__name__} has "
                "only q; add a method v [batch, observation size] -> [batch], or use the IQL critic"
            )
        if not (0.0 <= temperature < math.inf):
            raise InputError(f"temperature={temperature}, needed finite and at least 0; correct it")
        if num_updates is not None and num_updates < 1:
            raise InputError(f"num_updates={num_updates}, needed at least 1, or None for no decay")
        self.policy = policy
        self.critic = critic
        self.temperature = temperature
        self.optimiser = torch.optim.Adam(policy.parameters(), lr=learning_rate, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: 1.0 if num_updates is None else _cosine(step / num_updates)
        )

    def update(self, batch: "Transitions") -> dict[str, Tensor]:
        """One gradient step; returns detached scalars and waits for no device."""
        observation, action = batch.observations, batch.actions
        with torch.no_grad():
            advantage = self.critic.q(observation, action) - self.critic.v(observation)
            weight = torch.exp(self.temperature * advantage).clamp(max=LARGEST_WEIGHT)
        log_prob = self.policy.log_prob(observation, action)
        loss = -(weight * log_prob).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        with torch.no_grad():
            self.policy.log_std.clamp_(*LOG_STD_RANGE)
        return {
            "policy/loss": loss.detach(),
            "policy/log_prob": log_prob.detach().mean(),
            "policy/weight_mean": weight.mean(),
            "policy/weight_clipped": (weight >= LARGEST_WEIGHT).float().mean(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Policy, optimiser and position in the schedule: what an exact resume needs."""
        return {
            "policy": self.policy.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, into a policy of the same sizes."""
        self.policy.load_state_dict(state["policy"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def _check_box(low: Tensor, high: Tensor) -> None:
    if low.ndim != 1 or low.shape != high.shape:
        raise InputError(
            f"action_low has shape {list(low.shape)} and action_high {list(high.shape)}; "
            "give both as [action size], as in env.action_space.low and .high"
        )
    if not (torch.isfinite(low).all() and torch.isfinite(high).all() and (low < high).all()):
        raise InputError(
            f"action_low {low.tolist()} must be finite and below action_high {high.tolist()} in "
            "every coordinate; take them from env.action_space"
        )
