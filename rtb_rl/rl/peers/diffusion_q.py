"""Diffusion-QL: a diffusion policy that imitates and climbs Q through its chain (2208.06193)."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import Denoiser, GaussianDiffusion
from rtb_rl.errors import InputError
from rtb_rl.rl.critics.bootstrap import bootstrapped
from rtb_rl.rl.critics.training import CriticSettings, scaled_for_critic
from rtb_rl.rl.critics.twin_q import TwinQ
from rtb_rl.rl.data.dataset import TransitionDataset, Transitions, data_facts
from rtb_rl.rl.episodes.curve import Watch, unwatched
from rtb_rl.rl.fitted import finished_config
from rtb_rl.rl.peers.diffusion_q_policy import DiffusionQPolicy, draw_actions
from rtb_rl.rl.posteriors.prior import ActionDiffusion, ActionNetwork
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.ema import Average
from rtb_rl.training.loop import train
from rtb_rl.training.pretrain import random_level
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import GeneratorState, generator_for
from rtb_rl.training.stage import complete, device_for_training, load_weights


@dataclass(frozen=True)
class DiffusionQSettings:
    """The authors' settings for locomotion (arXiv 2208.06193, appendix E, and their code).

    Networks, schedule and denoising loss (of the velocity, not the noise) are this package's. The
    spread of a step is that of q(x[k-1] | x[k], x[0]), as theirs; few levels then draw narrower
    than the data.
    """

    steps: int = 2_000_000
    batch: int = 256
    network: ActionNetwork = field(default_factory=lambda: ActionNetwork(levels=5))
    eta: float = 1.0
    """Weight of Q, whose mean absolute value is divided out, against the denoising loss; the
    authors take 0.5 to 4.5 on antmaze, 0.1 to 0.15 on pen, 0.005 in the kitchen."""
    discount: float = 0.99
    backup_actions: int = 1
    """Next actions, of which each Q backs up the best; the authors take 10 on most of antmaze."""
    polyak: float = 0.005
    learning_rate: float = 3e-4
    gradient_clip: float = 4.0
    """Largest norm of either gradient; the authors take 1 to 10, by data set."""
    average_decay: float = 0.995
    """Of the average of the policy, which draws the next actions and acts."""
    average_every: int = 5
    candidates: int = 50
    """Actions drawn to act, of which one is kept."""
    choice_beta: float = 1.0
    """Probability of a candidate: softmax(choice_beta Q), per unit of the scaled rewards. The
    authors have 1 per unit of the environment's."""

    def __post_init__(self):
        counts = "steps", "batch", "backup_actions", "average_every", "candidates"
        for name, bound in (dict.fromkeys(counts, 1) | {"eta": 0}).items():
            if not bound <= (value := getattr(self, name)) < math.inf:
                raise InputError(
                    f"Diffusion-QL got {name}={value}, needed a finite number, at least {bound}"
                )


def denoising_loss(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    actions: Tensor,
    observations: Tensor,
    *,
    generator: Generator,
) -> Tensor:
    """The loss that the behaviour prior is pretrained with, at levels drawn uniformly; a scalar."""
    level = random_level(len(actions), diffusion.levels, generator=generator)
    x = diffusion.corrupt(actions, level, generator=generator)
    prediction = denoiser(x, level, observations)
    return diffusion.denoising_loss(prediction, actions, x, level).mean()


def normalised_q_loss(q: Tensor, *, generator: Generator) -> Tensor:
    """-mean Q_i / mean |Q_j| for the two Qs in random order; `q` [2, batch], no gradient below.

    The scale of the rewards drops out (section 3 of the paper: eta is divided by E|Q|).
    """
    first = torch.randint(2, (1,), generator=generator, device=generator.device)
    return -q[first].mean() / q[1 - first].detach().abs().mean()


class DiffusionQ:
    """Trains a diffusion of actions and its critic in place, one batch at a time."""

    def __init__(
        self,
        actor: ActionDiffusion,
        critic: TwinQ,
        settings: DiffusionQSettings,
        *,
        generator: Generator,
    ):
        self.actor, self.critic = actor, critic
        self.average = Average(actor.denoiser, settings.average_decay)
        self.settings, self.generator = settings, generator
        self.actor_parameters = list(actor.denoiser.parameters())
        self.critic_parameters = list(critic.network.parameters())
        rate = settings.learning_rate
        self.actor_optimiser = torch.optim.Adam(self.actor_parameters, lr=rate, fused=True)
        self.critic_optimiser = torch.optim.Adam(self.critic_parameters, lr=rate, fused=True)

    def update(self, step: int, batch: Transitions) -> dict[str, Tensor]:
        """One step of the critic, of the policy and of the targets."""
        metrics = self.improve_critic(batch) | self.improve_policy(batch)
        if (step + 1) % self.settings.average_every == 0:
            self.average.update(self.actor.denoiser)
        self.critic.follow(self.settings.polyak)
        return metrics

    @torch.no_grad()
    def regression_target(self, batch: Transitions) -> Tensor:
        """reward + discount * min over Qs of their best of `backup_actions` draws, [batch]."""
        n = self.settings.backup_actions
        each = batch.next_observations.repeat_interleave(n, dim=0)
        actions = draw_actions(
            self.actor.diffusion, self.average.module, each, generator=self.generator
        )
        q = self.critic.both_targets(each, actions).reshape(2, -1, n)
        return bootstrapped(batch, q.amax(2).amin(0), self.settings.discount)

    def improve_critic(self, batch: Transitions) -> dict[str, Tensor]:
        """Regress both Qs on the target."""
        q = self.critic.both(batch.observations, batch.actions)
        loss = (q - self.regression_target(batch)).square().mean(1).sum()
        self._descend(loss, self.critic_optimiser, self.critic_parameters)
        return {"dql/critic_loss": loss.detach(), "dql/q_mean": q.detach().mean()}

    def improve_policy(self, batch: Transitions) -> dict[str, Tensor]:
        """Descend denoising loss + eta * normalised Q of the chain's own draws (eq. 3)."""
        diffusion, denoiser, generator = self.actor.diffusion, self.actor.denoiser, self.generator
        observations = batch.observations
        imitation = denoising_loss(
            diffusion, denoiser, batch.actions, observations, generator=generator
        )
        actions = draw_actions(diffusion, denoiser, observations, generator=generator)
        q = self.critic.both(observations, actions)
        loss = imitation + self.settings.eta * normalised_q_loss(q, generator=generator)
        self._descend(loss, self.actor_optimiser, self.actor_parameters)
        return {"dql/denoising_loss": imitation.detach(), "dql/q_of_draws": q.detach().mean()}

    def _descend(self, loss: Tensor, optimiser: torch.optim.Optimizer, parameters: list) -> None:
        optimiser.zero_grad(set_to_none=True)
        loss.backward(inputs=parameters)
        nn.utils.clip_grad_norm_(parameters, self.settings.gradient_clip)
        optimiser.step()

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold."""
        return {
            "denoiser": self.actor.denoiser,
            "average": self.average,
            "critic": self.critic,
            "actor_optimiser": self.actor_optimiser,
            "critic_optimiser": self.critic_optimiser,
            "generator": GeneratorState(self.generator),
        }


def fit_diffusion_q(
    directory: str | Path,
    dataset: TransitionDataset,
    settings: DiffusionQSettings | None = None,
    *,
    critic_settings: CriticSettings | None = None,
    seed: int = 0,
    watch: Watch = unwatched,
) -> DiffusionQPolicy:
    """The policy of Diffusion-QL, trained with the rewards that a critic of `critic_settings` gets.

    Observations are standardised, a std below 1e-3 counting as 1e-3.
    """
    settings = settings or DiffusionQSettings()
    scaled, words = scaled_for_critic(dataset, critic_settings or CriticSettings())
    facts = {**data_facts(dataset), "rewards": words}
    run = Run(directory, {**facts, "dql": asdict(settings), "seed": seed})
    device = device_for_training()
    sizes = dataset.observation_size, dataset.action_size
    model = _networks(*sizes, settings.network, seed=seed).to(device)
    box = dataset.action_low.to(device), dataset.action_high.to(device)

    def fit() -> dict[str, Any]:
        data, generator = scaled.to(device), generator_for(seed, "dql", device=device)
        model.actor.denoiser.network.standardise(data.observations)  # type: ignore[operator]
        model.critic.scaler.fit(data.observations)
        trainer = DiffusionQ(model.actor, model.critic, settings, generator=generator)
        acting = _policy(model, trainer.average.module, settings, box)
        seconds = train(
            run,
            lambda step: trainer.update(step, data.sample(settings.batch, generator=generator)),
            trainer.parts,
            steps=settings.steps,
            description="dql",
            after_step=lambda done: watch(done, settings.steps, acting),
        )
        model.actor.denoiser.load_state_dict(trainer.average.module.state_dict())
        return {"seconds": seconds, "rewards": words}

    complete(run, model, fit)
    return _policy(model, model.actor.denoiser, settings, box)


def load_diffusion_q(directory: str | Path) -> DiffusionQPolicy:
    """The policy that `fit_diffusion_q` left in a directory."""
    config = finished_config(Path(directory))
    network = ActionNetwork(**config["dql"]["network"])
    settings = DiffusionQSettings(**{**config["dql"], "network": network})
    model = _networks(config["observation_size"], config["action_size"], network, seed=0)
    load_weights(Path(directory), model)
    model.requires_grad_(False).eval()
    box = torch.tensor(config["action_low"]), torch.tensor(config["action_high"])
    return _policy(model, model.actor.denoiser, settings, box)


class _Networks(nn.Module):
    """What a stage keeps: the diffusion of actions and the critic that chooses among its draws."""

    def __init__(self, actor: ActionDiffusion, critic: TwinQ):
        super().__init__()
        self.actor, self.critic = actor, critic


def _networks(
    observation_size: int, action_size: int, network: ActionNetwork, *, seed: int
) -> _Networks:
    generators = [generator_for(seed, "dql", name) for name in ("actor", "critic")]
    actor = ActionDiffusion(observation_size, action_size, network, generator=generators[0])
    return _Networks(actor, TwinQ(observation_size, action_size, depth=3, generator=generators[1]))


def _policy(
    model: _Networks,
    denoiser: Denoiser,
    settings: DiffusionQSettings,
    box: tuple[Tensor, Tensor],
) -> DiffusionQPolicy:
    return DiffusionQPolicy(
        model.actor.diffusion,
        denoiser,
        model.critic,
        candidates=settings.candidates,
        beta=settings.choice_beta,
        action_low=box[0],
        action_high=box[1],
    )
