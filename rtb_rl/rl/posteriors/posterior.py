"""The posterior policy pi(a | s) = mu(a | s) exp(beta Q(s, a)) / Z(s), by trajectory balance."""

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from rtb_rl.core import ConditionalLogZ, GroupMeanLogZ, Sampler, penalty_of, rtb
from rtb_rl.core.protocols import Objective
from rtb_rl.errors import InputError
from rtb_rl.nn import MLP, LangevinDenoiser, LearnedSpread
from rtb_rl.rl.critics.critic import Critic, check_critic
from rtb_rl.rl.critics.identity import critic_fingerprint
from rtb_rl.rl.data.dataset import TransitionDataset, data_facts
from rtb_rl.rl.episodes.curve import Watch, unwatched
from rtb_rl.rl.episodes.evaluation import Policy
from rtb_rl.rl.posteriors.policy import DiffusionPolicy
from rtb_rl.rl.posteriors.prior import ActionDiffusion
from rtb_rl.rl.posteriors.task import critic_gradient, offline_rl_task
from rtb_rl.training.diagnostics import diagnose
from rtb_rl.training.finetune import Finetuner
from rtb_rl.training.loop import train
from rtb_rl.training.mix import LearnedLogZ
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.settings import FinetuneSettings
from rtb_rl.training.stage import complete, fingerprint
from rtb_rl.training.task import Task

LOG_EVERY = 20
CHECKPOINT_EVERY = 200


@dataclass(frozen=True)
class PosteriorSettings:
    """How the posterior is trained."""

    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    huber_threshold: float | None = None
    """Residuals beyond it, in nats, are penalised linearly; None: squared throughout."""
    grouped_log_z: bool = False
    """Log Z(s) as the mean over the paths of a state (VarGrad) instead of a network."""
    langevin: bool = False
    """Add a learned multiple of the critic's gradient to the prediction."""
    diagnostic_rows: int = 64
    """States of the final diagnostics, with 256 draws each."""


def posterior_model(
    prior: ActionDiffusion, critic: Critic | None, *, langevin: bool
) -> ActionDiffusion:
    """A model that starts exactly at the prior: every log-ratio is zero.

    The critic is needed for the Langevin term alone.
    """
    model = copy.deepcopy(prior).requires_grad_(True)
    (size,) = prior.diffusion.event_shape
    levels = prior.diffusion.levels
    if langevin:
        if critic is None:
            raise InputError("the Langevin term needs the critic that the posterior was made with")
        gradient = critic_gradient(critic)
        model.denoiser = LangevinDenoiser(model.denoiser, gradient, levels=levels, size=size)
    model.denoiser = LearnedSpread(model.denoiser, levels=levels, size=size).to(prior.device)
    return model


def fit_posterior(
    directory: str | Path,
    dataset: TransitionDataset,
    prior: ActionDiffusion,
    critic: Critic,
    settings: PosteriorSettings | None = None,
    *,
    seed: int = 0,
    watch: Watch = unwatched,
) -> ActionDiffusion:
    """The posterior of a behaviour prior and a critic; results.json of its run has the diagnostics.

    Raises InputError for a critic whose `q` does not return one finite number a row.
    """
    settings = settings or PosteriorSettings()
    run, posterior = open_posterior(directory, dataset, prior, critic, settings, seed=seed)
    data = dataset.to(prior.device)
    task = offline_rl_task(
        data, prior.diffusion, prior.denoiser, copy.deepcopy(posterior.denoiser), critic
    )

    def fit() -> dict[str, Any]:
        finetuner = Finetuner(
            task,
            new_log_z(data, settings, seed),
            settings.finetune,
            generator=generator_for(seed, "posterior", device=prior.device),
            objective=objective_of(settings),
            accelerator=Accelerator(),
        )
        sampler = Sampler(prior.diffusion, finetuner.average.module)
        policy = DiffusionPolicy(sampler, action_low=data.action_low, action_high=data.action_high)
        seconds = train_posterior(run, finetuner, policy, watch)
        posterior.denoiser.load_state_dict(finetuner.average.module.state_dict())
        return {
            "seconds": seconds,
            "diagnostics": diagnose_policy(task, posterior, settings, seed=seed),
        }

    complete(run, posterior, fit)
    return posterior


def open_posterior(
    directory: str | Path,
    dataset: TransitionDataset,
    prior: ActionDiffusion,
    critic: Critic,
    settings: PosteriorSettings,
    *,
    seed: int,
) -> tuple[Run, ActionDiffusion]:
    """The run of a posterior's stage, and the posterior as it starts.

    Raises InputError for a critic whose `q` does not return one finite number a row.
    """
    check_critic(critic, dataset.observation_size, dataset.action_size, device=prior.device)
    config = {
        **data_facts(dataset),
        "posterior": asdict(settings),
        "prior": fingerprint(prior),
        "critic": critic_fingerprint(critic, dataset, device=prior.device),
        "seed": seed,
    }
    run = Run(directory, config)
    return run, posterior_model(prior, critic, langevin=settings.langevin)


def diagnose_policy(
    task: Task, posterior: ActionDiffusion, settings: PosteriorSettings, *, seed: int
) -> dict[str, float]:
    """The diagnostics that results.json keeps."""
    return diagnose(
        task,
        posterior.denoiser,
        settings.finetune.beta,
        rows=settings.diagnostic_rows,
        generator=generator_for(seed, "diagnostics", device=posterior.device),
    )


def train_posterior(
    run: Run,
    finetuner: Finetuner,
    policy: Policy,
    watch: Watch,
    *,
    description: str = "posterior",
) -> float:
    """Train to the end; the seconds it took. `policy` acts by the average, and is watched."""
    updates = finetuner.settings.updates
    return train(
        run,
        finetuner.update,
        finetuner.parts,
        steps=updates,
        description=description,
        log_every=LOG_EVERY,
        checkpoint_every=CHECKPOINT_EVERY,
        after_step=lambda done: watch(done, updates, policy),
    )


def objective_of(settings: PosteriorSettings) -> Objective:
    """Trajectory balance with the penalty of the settings."""
    return rtb(penalty_of(settings.huber_threshold, None))


def new_log_z(dataset: TransitionDataset, settings: PosteriorSettings, seed: int) -> LearnedLogZ:
    """The estimate of log Z(s) that the settings ask for, as it starts."""
    if settings.grouped_log_z:
        return GroupMeanLogZ(settings.finetune.mix.total)
    network = MLP(dataset.observation_size, 1, generator=generator_for(seed, "log_z"))
    network.standardise(dataset.observations.cpu())
    return ConditionalLogZ(network).to(dataset.observations.device)
