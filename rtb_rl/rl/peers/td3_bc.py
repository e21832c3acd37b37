"""TD3+BC: the deterministic policy of TD3, kept near the data by a squared error (2106.06860)."""

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rtb_rl.errors import InputError
from rtb_rl.nn.ensemble import EnsembleMLP
from rtb_rl.rl.critics.bootstrap import bootstrapped, follow
from rtb_rl.rl.critics.critic import ObservationScaler
from rtb_rl.rl.critics.training import CriticSettings, scaled_for_critic
from rtb_rl.rl.critics.twin_q import TwinQ
from rtb_rl.rl.data.dataset import TransitionDataset, Transitions, data_facts
from rtb_rl.rl.episodes.action_box import to_box
from rtb_rl.rl.episodes.curve import Watch, unwatched
from rtb_rl.rl.fitted import finished_config
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.loop import train
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import GeneratorState, generator_for
from rtb_rl.training.stage import complete, device_for_training, load_weights


@dataclass(frozen=True)
class TD3BCSettings:
    """The authors' settings (arXiv 2106.06860, table 3 and their code)."""

    steps: int = 1_000_000
    batch: int = 256
    alpha: float = 2.5
    """Weight of Q, whose mean absolute value is divided out, against the squared error."""
    discount: float = 0.99
    policy_noise: float = 0.2
    """Std of the noise on the target's actions, in units of the half-width of the action box."""
    noise_clip: float = 0.5
    policy_delay: int = 2
    """Critic steps for one of the policy and of the targets."""
    polyak: float = 0.005
    learning_rate: float = 3e-4

    def __post_init__(self):
        if self.steps < 1 or self.batch < 1:
            raise InputError(
                f"TD3+BC got steps={self.steps} and batch={self.batch}; give at least 1 of each"
            )
        weighs = 0 <= self.alpha < math.inf
        if not weighs or self.policy_delay < 1 or not 0 <= self.discount <= 1:
            raise InputError(
                f"TD3+BC got alpha={self.alpha}, policy_delay={self.policy_delay}, discount="
                f"{self.discount}; needed finite alpha >= 0, policy_delay >= 1, 0 <= discount <= 1"
            )


class DeterministicPolicy(nn.Module):
    """a = tanh(network(standardised s)), two hidden layers of 256 with ReLU.

    `action_low` and `action_high` [action size]: the environment's box, onto which [-1, 1] is
    mapped.
    """

    action_low: Tensor
    action_high: Tensor

    def __init__(
        self,
        observation_size: int,
        *,
        action_low: Tensor,
        action_high: Tensor,
        generator: Generator,
    ):
        super().__init__()
        self.scaler = ObservationScaler(observation_size, device=generator.device)
        self.network = EnsembleMLP(
            observation_size, len(action_low), members=1, generator=generator
        )
        self.register_buffer("action_low", action_low.clone())
        self.register_buffer("action_high", action_high.clone())

    def forward(self, observation: Tensor) -> Tensor:
        """[batch, observation size] -> [batch, action size] in [-1, 1]."""
        return torch.tanh(self.network(self.scaler(observation))[0])

    @property
    def device(self) -> torch.device:
        """Where it acts."""
        return self.action_low.device

    @torch.no_grad()
    def act(self, observations: Tensor, *, generator: Generator) -> Tensor:
        """One action a row, in the environment's units; nothing is drawn from `generator`."""
        return to_box(self(observations), self.action_low, self.action_high)


def policy_loss(q: Tensor, action: Tensor, recorded: Tensor, alpha: float) -> Tensor:
    """mean[-weight Q(s, pi(s)) + (pi(s) - a)^2], weight = alpha / mean |Q| (eqs 4 and 5).

    `q` [batch] are the values of `action`, `recorded` the data's actions, both [batch, action
    size]; the square is a mean over coordinates too. The weight has no gradient.
    """
    weight = alpha / q.detach().abs().mean()
    return -weight * q.mean() + (action - recorded).square().mean()


class TD3BC:
    """Trains a policy and its critic in place, one batch of transitions at a time."""

    def __init__(
        self,
        policy: DeterministicPolicy,
        critic: TwinQ,
        settings: TD3BCSettings,
        *,
        generator: Generator,
    ):
        self.policy, self.critic = policy, critic
        self.target = copy.deepcopy(policy).requires_grad_(False)
        self.settings, self.generator = settings, generator
        rate = settings.learning_rate
        self.policy_optimiser = torch.optim.Adam(policy.parameters(), lr=rate, fused=True)
        self.critic_optimiser = torch.optim.Adam(critic.network.parameters(), lr=rate, fused=True)

    def update(self, step: int, batch: Transitions) -> dict[str, Tensor]:
        """One step of the critic, and of the policy and targets where it is their turn."""
        metrics = self._improve_critic(batch)
        if (step + 1) % self.settings.policy_delay == 0:
            metrics |= self._improve_policy(batch)
            self.critic.follow(self.settings.polyak)
            follow(self.target, self.policy, self.settings.polyak)
        return metrics

    @torch.no_grad()
    def regression_target(self, batch: Transitions) -> Tensor:
        """reward + discount * min of both target Qs at the target policy's noisy action, [batch].

        The noise is clipped, and the noisy action to [-1, 1] (arXiv 1802.09477, section 5.3).
        """
        settings, device = self.settings, self.generator.device
        noise = torch.randn(batch.actions.shape, generator=self.generator, device=device)
        noise = (noise * settings.policy_noise).clamp(-settings.noise_clip, settings.noise_clip)
        action = (self.target(batch.next_observations) + noise).clamp(-1, 1)
        value = self.critic.q(batch.next_observations, action)
        return bootstrapped(batch, value, settings.discount)

    def _improve_critic(self, batch: Transitions) -> dict[str, Tensor]:
        q = self.critic.both(batch.observations, batch.actions)
        loss = (q - self.regression_target(batch)).square().mean(1).sum()
        self.critic_optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.critic_optimiser.step()
        return {"td3_bc/critic_loss": loss.detach(), "td3_bc/q_mean": q.detach().mean()}

    def _improve_policy(self, batch: Transitions) -> dict[str, Tensor]:
        action = self.policy(batch.observations)
        q = self.critic.both(batch.observations, action)[0]
        loss = policy_loss(q, action, batch.actions, self.settings.alpha)
        self.policy_optimiser.zero_grad(set_to_none=True)
        loss.backward(inputs=list(self.policy.parameters()))
        self.policy_optimiser.step()
        error = (action.detach() - batch.actions).square().mean()
        return {"td3_bc/policy_loss": loss.detach(), "td3_bc/squared_error": error}

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold."""
        return {
            "policy": self.policy,
            "target": self.target,
            "critic": self.critic,
            "policy_optimiser": self.policy_optimiser,
            "critic_optimiser": self.critic_optimiser,
            "generator": GeneratorState(self.generator),
        }


def fit_td3_bc(
    directory: str | Path,
    dataset: TransitionDataset,
    settings: TD3BCSettings | None = None,
    *,
    critic_settings: CriticSettings | None = None,
    seed: int = 0,
    watch: Watch = unwatched,
) -> DeterministicPolicy:
    """The policy of TD3+BC, trained with the rewards that a critic of `critic_settings` gets.

    Its loss does not depend on their scale. Observations are standardised, a std below 1e-3
    counting as 1e-3.
    """
    settings = settings or TD3BCSettings()
    scaled, words = scaled_for_critic(dataset, critic_settings or CriticSettings())
    facts = {**data_facts(dataset), "rewards": words}
    run = Run(directory, {**facts, "td3_bc": asdict(settings), "seed": seed})
    device = device_for_training()
    policy = DeterministicPolicy(
        dataset.observation_size,
        action_low=dataset.action_low,
        action_high=dataset.action_high,
        generator=generator_for(seed, "td3_bc", "policy"),
    ).to(device)

    def fit() -> dict[str, Any]:
        data, generator = scaled.to(device), generator_for(seed, "td3_bc", device=device)
        critic = TwinQ(
            dataset.observation_size,
            dataset.action_size,
            generator=generator_for(seed, "td3_bc", "critic"),
        ).to(device)
        for network in (policy, critic):
            network.scaler.fit(data.observations)
        trainer = TD3BC(policy, critic, settings, generator=generator)
        seconds = train(
            run,
            lambda step: trainer.update(step, data.sample(settings.batch, generator=generator)),
            trainer.parts,
            steps=settings.steps,
            description="td3_bc",
            after_step=lambda done: watch(done, settings.steps, policy),
        )
        return {"seconds": seconds, "rewards": words}

    complete(run, policy, fit)
    return policy


def load_td3_bc(directory: str | Path) -> DeterministicPolicy:
    """The policy that `fit_td3_bc` left in a directory."""
    config = finished_config(Path(directory))
    policy = DeterministicPolicy(
        config["observation_size"],
        action_low=torch.tensor(config["action_low"]),
        action_high=torch.tensor(config["action_high"]),
        generator=generator_for(0, "replaced"),
    )
    load_weights(Path(directory), policy)
    return policy.requires_grad_(False).eval()
