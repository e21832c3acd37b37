"""Fitting the IQL critic, and the Gaussian policy that IQL extracts from a critic."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from rtb_rl.rl.critics.critic import Critic, IQLCritic, ValueCritic
from rtb_rl.rl.critics.gaussian_policy import (
    AdvantageWeightedRegression,
    GaussianPolicy,
    MeanActionPolicy,
)
from rtb_rl.rl.critics.identity import critic_fingerprint
from rtb_rl.rl.critics.iql import IQL
from rtb_rl.rl.data.dataset import TransitionDataset, data_facts
from rtb_rl.rl.episodes.curve import Watch, unwatched
from rtb_rl.rl.episodes.scores import (
    antmaze_rewards,
    critic_rewards,
    published_return_scale,
    return_scale,
)
from rtb_rl.training.loop import train
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import GeneratorState, generator_for
from rtb_rl.training.stage import complete, device_for_training


@dataclass(frozen=True)
class CriticSettings:
    """How the IQL critic is trained (arXiv 2110.06169)."""

    steps: int = 40_000
    batch: int = 256
    discount: float = 0.99
    expectile: float = 0.7
    polyak: float = 0.005
    learning_rate: float = 3e-4
    members: int = 2
    """Q networks; the least of their values counts."""
    layer_norm: bool = False
    published_scaling: bool = False
    """Scale rewards by the factor that published code computes, which cuts episodes wrongly."""


@dataclass(frozen=True)
class GaussianSettings:
    """How the advantage-weighted Gaussian policy is trained: as long as the critic."""

    steps: int = 40_000
    batch: int = 256
    temperature: float = 3.0
    learning_rate: float = 3e-4


def scaled_for_critic(
    dataset: TransitionDataset, settings: CriticSettings
) -> tuple[TransitionDataset, str]:
    """The data set with the rewards a critic is trained on, and the change in words.

    Antmaze: reward - 1. Kitchen, hand tasks and OGBench: as recorded. Everything else: times
    1000 / (largest - least return), and as recorded where all returns are equal, as those of
    demonstrations that pay 1 at their end. See `scores.critic_rewards`.
    """
    treatment = critic_rewards(dataset.name, dataset.env_id)
    if treatment == "minus one":
        return dataset.with_rewards(antmaze_rewards(dataset.rewards)), "reward - 1"
    if treatment == "recorded":
        return dataset, "reward as recorded"
    published = settings.published_scaling
    factor = published_return_scale(dataset) if published else return_scale(dataset)
    if factor is None:
        return dataset, "reward as recorded (returns have no spread to scale by)"
    words = f"reward * {factor:.6g} ({'as published' if published else 'by whole episodes'})"
    return dataset.with_rewards(dataset.rewards * factor), words


def fit_critic(
    directory: str | Path,
    dataset: TransitionDataset,
    settings: CriticSettings | None = None,
    *,
    seed: int = 0,
) -> IQLCritic:
    """Q and V by implicit Q-learning, in units of the scaled rewards."""
    settings = settings or CriticSettings()
    run, critic = open_critic(directory, dataset, settings, seed=seed)
    device = device_for_training()

    def fit() -> dict[str, Any]:
        scaled, words = scaled_for_critic(dataset, settings)
        data, generator = scaled.to(device), generator_for(seed, "critic", device=device)
        critic.scaler.fit(data.observations)
        iql = new_iql(critic, settings)
        seconds = train(
            run,
            lambda step: iql.update(data.sample(settings.batch, generator=generator)),
            {"iql": iql, "generator": GeneratorState(generator)},
            steps=settings.steps,
            description="critic",
        )
        return {"seconds": seconds, "rewards": words}

    complete(run, critic, fit)
    return critic


def open_critic(
    directory: str | Path, dataset: TransitionDataset, settings: CriticSettings, *, seed: int
) -> tuple[Run, IQLCritic]:
    """The run of a critic's stage, and the critic as it starts."""
    run = Run(directory, critic_config(dataset, settings, seed=seed))
    critic = new_critic(dataset.observation_size, dataset.action_size, settings, seed=seed)
    return run, critic.to(device_for_training())


def critic_config(
    dataset: TransitionDataset, settings: CriticSettings, *, seed: int
) -> dict[str, Any]:
    """The configuration of a critic's stage."""
    return {**data_facts(dataset), "critic": asdict(settings), "seed": seed}


def new_iql(critic: IQLCritic, settings: CriticSettings) -> IQL:
    """What trains the critic as the settings say."""
    return IQL(
        critic,
        discount=settings.discount,
        expectile=settings.expectile,
        polyak=settings.polyak,
        learning_rate=settings.learning_rate,
    )


def new_critic(
    observation_size: int, action_size: int, settings: CriticSettings, *, seed: int = 0
) -> IQLCritic:
    """An untrained critic of the settings' size."""
    return IQLCritic(
        observation_size,
        action_size,
        members=settings.members,
        layer_norm=settings.layer_norm,
        generator=generator_for(seed, "critic", "initial"),
    )


def fit_gaussian_policy(
    directory: str | Path,
    dataset: TransitionDataset,
    critic: Critic,
    settings: GaussianSettings | None = None,
    *,
    seed: int = 0,
    watch: Watch = unwatched,
) -> GaussianPolicy:
    """The policy of IQL: a Gaussian regressed on the data, weighted by exp(temperature (Q - V)).

    Raises InputError for a critic without `v`.
    """
    settings = settings or GaussianSettings()
    device = device_for_training()
    run = Run(directory, gaussian_config(dataset, critic, settings, seed=seed, device=device))
    policy = GaussianPolicy(
        dataset.observation_size,
        action_low=dataset.action_low,
        action_high=dataset.action_high,
        generator=generator_for(seed, "gaussian", "initial"),
    ).to(device)
    trainer = AdvantageWeightedRegression(
        policy,
        cast(ValueCritic, critic),
        temperature=settings.temperature,
        learning_rate=settings.learning_rate,
        num_updates=settings.steps,
    )

    def fit() -> dict[str, Any]:
        data, generator = dataset.to(device), generator_for(seed, "gaussian", device=device)
        policy.scaler.fit(data.observations)
        acting = MeanActionPolicy(policy)
        seconds = train(
            run,
            lambda step: trainer.update(data.sample(settings.batch, generator=generator)),
            {"trainer": trainer, "generator": GeneratorState(generator)},
            steps=settings.steps,
            description="gaussian",
            after_step=lambda done: watch(done, settings.steps, acting),
        )
        return {"seconds": seconds}

    complete(run, policy, fit)
    return policy


def gaussian_config(
    dataset: TransitionDataset,
    critic: Critic,
    settings: GaussianSettings,
    *,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """The configuration of the stage of the policy that IQL extracts from a critic there."""
    told = critic_fingerprint(critic, dataset, device=device)
    return {**data_facts(dataset), "gaussian": asdict(settings), "critic": told, "seed": seed}
