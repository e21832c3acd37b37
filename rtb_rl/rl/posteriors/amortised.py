"""One posterior for a range of beta: pi(a | s, beta) = mu(a | s) exp(beta Q(s, a)) / Z(s, beta).

Beta is one more number of the condition, drawn anew for each state of an update; how strongly the
critic counts is then chosen when acting.
"""

import copy
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Generator, Tensor, nn

from rtb_rl.core import GroupMeanLogZ, Sampler
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.nn import ResidualMLP
from rtb_rl.nn.correction import ScaledCorrection
from rtb_rl.rl.critics.critic import Critic, check_critic
from rtb_rl.rl.critics.identity import critic_fingerprint
from rtb_rl.rl.data.dataset import TransitionDataset, data_facts
from rtb_rl.rl.episodes.curve import Watch, unwatched
from rtb_rl.rl.posteriors.policy import DiffusionPolicy
from rtb_rl.rl.posteriors.posterior import train_posterior
from rtb_rl.rl.posteriors.prior import ActionDiffusion, ActionNetwork
from rtb_rl.rl.posteriors.task import critic_log_reward
from rtb_rl.training.diagnostics import diagnose
from rtb_rl.training.finetune import Finetuner
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.settings import FinetuneSettings
from rtb_rl.training.stage import complete, fingerprint
from rtb_rl.training.task import Task


@dataclass(frozen=True)
class AmortisedSettings:
    """How a posterior of many strengths is trained."""

    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    """Its beta stays 1: beta is in the condition."""
    low: float = 0.3
    high: float = 10.0
    """Between them log beta is uniform."""
    network: ActionNetwork = field(default_factory=ActionNetwork)
    """Sizes of what is added to the prior; its levels are the prior's."""
    diagnostic_rows: int = 64

    def __post_init__(self):
        if not 0 < self.low < self.high < math.inf:
            raise InputError(
                f"strengths from {self.low:g} to {self.high:g} are no range; give 0 < low < high"
            )
        if self.finetune.beta != 1:
            raise InputError(
                f"beta is {self.finetune.beta:g} beside a range of strengths, which would multiply;"
                " leave it at 1"
            )

    def strengths(self, n: int, *, generator: Generator) -> Tensor:
        """n values of beta, their logarithms uniform over the range: [n]."""
        share = torch.rand(n, generator=generator, device=generator.device)
        return self.low * (self.high / self.low) ** share


class StrengthBlind(nn.Module):
    """A denoiser whose condition ends in log beta, by one that knows nothing of it."""

    def __init__(self, prior: nn.Module):
        super().__init__()
        self.prior = prior

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Any:
        assert isinstance(condition, Tensor)
        return self.prior(x, level, condition[:, :-1])


def with_strength(observations: Tensor, beta: Tensor | float) -> Tensor:
    """The condition of a strength: [rows, d_o] -> [rows, d_o + 1], log beta last."""
    strength = torch.as_tensor(beta, dtype=observations.dtype, device=observations.device)
    return torch.cat([observations, strength.log().expand(len(observations))[:, None]], dim=1)


class AmortisedPolicy:
    """Acts by draws of the posterior of one strength."""

    def __init__(self, policy: DiffusionPolicy, beta: float):
        self.policy, self.beta = policy, beta

    @property
    def device(self) -> torch.device:
        """Where it acts."""
        return self.policy.device

    def act(self, observations: Tensor, *, generator: Generator) -> Tensor:
        """Actions [batch, d_a] in the environment's units for observations [batch, d_o]."""
        return self.policy.act(with_strength(observations, self.beta), generator=generator)


def amortised_model(
    prior: ActionDiffusion, observation_size: int, network: ActionNetwork, *, seed: int
) -> ScaledCorrection:
    """A denoiser of (x, level, [observation, log beta]) that starts exactly at the prior."""
    (size,) = prior.diffusion.event_shape
    residual_mlp = ResidualMLP(
        size,
        prior.diffusion.levels,
        condition_size=observation_size + 1,
        width=network.width,
        blocks=network.blocks,
        output_size=2 * size,
        generator=generator_for(seed, "amortised", "initial"),
    )
    blind = StrengthBlind(copy.deepcopy(prior.denoiser)).requires_grad_(False)
    return ScaledCorrection(blind, residual_mlp, prior.diffusion).to(prior.device)


def fit_amortised(
    directory: str | Path,
    dataset: TransitionDataset,
    prior: ActionDiffusion,
    critic: Critic,
    settings: AmortisedSettings | None = None,
    *,
    acting_beta: float | None = None,
    seed: int = 0,
    watch: Watch = unwatched,
) -> ScaledCorrection:
    """The denoiser of all strengths; its results have diagnostics at `acting_beta`, and in
    `strengths` at low, high and their geometric mean. Without an acting beta nothing is watched.

    InputError for an acting beta outside the range.
    """
    settings = settings or AmortisedSettings()
    if acting_beta is not None:
        check_acting(acting_beta, settings)
    check_critic(critic, dataset.observation_size, dataset.action_size, device=prior.device)
    told = critic_fingerprint(critic, dataset, device=prior.device)
    made_of = {"prior": fingerprint(prior), "critic": told}
    config = {**data_facts(dataset), "amortised": asdict(settings), **made_of, "seed": seed}
    run = Run(directory, {**config, "acting_beta": acting_beta})
    data = dataset.to(prior.device)
    model = amortised_model(prior, dataset.observation_size, settings.network, seed=seed)

    def fit() -> dict[str, Any]:
        network = model.network
        assert isinstance(network, ResidualMLP)
        network.standardise(_some_conditions(data, settings, seed))
        task = amortised_task(data, prior, copy.deepcopy(model), critic, settings)
        finetuner = Finetuner(
            task,
            GroupMeanLogZ(settings.finetune.mix.total),
            settings.finetune,
            generator=generator_for(seed, "amortised", device=prior.device),
            accelerator=Accelerator(),
        )
        middle = math.sqrt(settings.low * settings.high)
        watched = middle if acting_beta is None else acting_beta
        policy = amortised_policy(prior, finetuner.average.module, data, watched)
        seen = unwatched if acting_beta is None else watch
        seconds = train_posterior(run, finetuner, policy, seen, description="all strengths")
        model.load_state_dict(finetuner.average.module.state_dict())
        found = {
            beta: diagnose_strength(data, prior, model, critic, settings, beta, seed=seed)
            for beta in (watched, settings.low, middle, settings.high)
        }
        strengths = {f"{beta:.4g}": told for beta, told in found.items()}
        told = {} if acting_beta is None else {"diagnostics": found[acting_beta]}
        return {"seconds": seconds, **told, "strengths": strengths}

    complete(run, model, fit)
    return model


def amortised_task(
    data: TransitionDataset,
    prior: ActionDiffusion,
    posterior: nn.Module,
    critic: Critic,
    settings: AmortisedSettings,
    *,
    only: float | None = None,
) -> Task:
    """Fine-tuning towards all strengths of the range, or towards `only` one: log r = beta Q."""
    log_reward = critic_log_reward(critic)

    def strong_reward(x0: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, Tensor)
        return condition[:, -1].exp() * log_reward(x0, condition[:, :-1])

    def draw(n: int, *, generator: Generator) -> tuple[Condition, Tensor | None]:
        batch = data.sample(n, generator=generator)
        strength = settings.strengths(n, generator=generator) if only is None else only
        return with_strength(batch.observations, strength), batch.actions

    blind = StrengthBlind(prior.denoiser)
    return Task(data.name, prior.diffusion, blind, posterior, strong_reward, draw)


def amortised_policy(
    prior: ActionDiffusion, denoiser: nn.Module, data: TransitionDataset, beta: float
) -> AmortisedPolicy:
    """Acts at one strength."""
    sampler = Sampler(prior.diffusion, denoiser)
    policy = DiffusionPolicy(sampler, action_low=data.action_low, action_high=data.action_high)
    return AmortisedPolicy(policy, beta)


def check_acting(beta: float, settings: AmortisedSettings) -> None:
    """InputError for a strength that the posterior isn't trained for."""
    if not settings.low <= beta <= settings.high:
        raise InputError(
            f"beta {beta:g} is outside the strengths {settings.low:g} to {settings.high:g} that the"
            " posterior is trained for; act at one between, or train for a wider range"
        )


def _some_conditions(data: TransitionDataset, settings: AmortisedSettings, seed: int) -> Tensor:
    """All observations, each with a strength: what inputs are standardised by."""
    observations = data.observations
    generator = generator_for(seed, "strengths", device=observations.device)
    return with_strength(observations, settings.strengths(len(observations), generator=generator))


def diagnose_strength(
    data: TransitionDataset,
    prior: ActionDiffusion,
    model: nn.Module,
    critic: Critic,
    settings: AmortisedSettings,
    beta: float,
    *,
    seed: int,
) -> dict[str, float]:
    """How far the posterior of one strength is from the truth."""
    return diagnose(
        amortised_task(data, prior, model, critic, settings, only=beta),
        model,
        1.0,
        rows=settings.diagnostic_rows,
        generator=generator_for(seed, "diagnostics", device=prior.device),
    )
