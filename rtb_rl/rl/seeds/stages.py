"""Prior, critic and posterior of several seeds, each kind trained at once as one stacked network.

The stage directories are those that the seeds would leave one by one: the same configuration,
results, metrics and checkpoints, and the same weights to rounding. Complete stages are loaded, the
others are trained together; one that was interrupted resumes.

What it saves is the work between the matrix products. On CPU cores the products are most of it
(`rtb-rl bench seeds_at_once`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rtb_rl.nn.stacked import check_alike
from rtb_rl.rl.critics.critic import Critic, IQLCritic
from rtb_rl.rl.critics.training import CriticSettings, open_critic, scaled_for_critic
from rtb_rl.rl.data.dataset import TransitionDataset
from rtb_rl.rl.posteriors.posterior import (
    CHECKPOINT_EVERY,
    LOG_EVERY,
    PosteriorSettings,
    diagnose_policy,
    new_log_z,
    objective_of,
    open_posterior,
)
from rtb_rl.rl.posteriors.prior import (
    ActionDiffusion,
    ActionNetwork,
    calibrate,
    draw_actions,
    open_prior,
)
from rtb_rl.rl.posteriors.task import offline_rl_task
from rtb_rl.rl.seeds.finetuning import SeedFinetuner, check_settings
from rtb_rl.rl.seeds.runs import (
    Generators,
    check_seeds,
    fit_together,
    of_seed,
    train_together,
)
from rtb_rl.rl.seeds.task import seed_task
from rtb_rl.rl.seeds.training import SeedIQL, SeedPretrainer
from rtb_rl.training.pretrain import PretrainSettings
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import device_for_training

Directories = Sequence[str | Path]


def fit_priors(
    directories: Directories,
    dataset: TransitionDataset,
    settings: PretrainSettings | None = None,
    network: ActionNetwork | None = None,
    *,
    seeds: Sequence[int],
) -> list[ActionDiffusion]:
    """`fit_prior` for every seed, each in its directory.

    Raises InputError unless there is one directory of its own for each seed.
    """
    check_seeds(seeds, directories=directories)
    settings, network = settings or PretrainSettings(), network or ActionNetwork()
    pairs = zip(directories, seeds, strict=True)
    stages = [open_prior(where, dataset, settings, network, seed=seed) for where, seed in pairs]
    models = [model for _, model in stages]
    data = dataset.to(models[0].device)

    def fit(pending: list[int]) -> list[dict[str, Any]]:
        chosen = [models[n] for n in pending]
        for model in chosen:
            model.denoiser.network.standardise(data.observations)  # type: ignore[operator]
        generators = _generators([seeds[n] for n in pending], "prior")
        trainer = SeedPretrainer(chosen, draw_actions(data), settings, generators=generators)
        seconds = train_together(
            [stages[n][0] for n in pending],
            trainer.update,
            trainer.parts,
            steps=settings.steps,
            description="priors",
        )
        average = trainer.inner.average.module.state_dict()
        for i, model in enumerate(chosen):
            model.denoiser.load_state_dict(of_seed(average, i))
        spreads = [calibrate(models[n], data, seed=seeds[n]) for n in pending]
        return [{"seconds": seconds, "spread": spread} for spread in spreads]

    fit_together(stages, fit)
    return models


def fit_critics(
    directories: Directories,
    dataset: TransitionDataset,
    settings: CriticSettings | None = None,
    *,
    seeds: Sequence[int],
) -> list[IQLCritic]:
    """`fit_critic` for every seed, each in its directory.

    Raises InputError unless there is one directory of its own for each seed.
    """
    check_seeds(seeds, directories=directories)
    settings = settings or CriticSettings()
    pairs = zip(directories, seeds, strict=True)
    stages = [open_critic(where, dataset, settings, seed=seed) for where, seed in pairs]
    critics = [critic for _, critic in stages]

    def fit(pending: list[int]) -> list[dict[str, Any]]:
        scaled, words = scaled_for_critic(dataset, settings)
        data, chosen = scaled.to(device_for_training()), [critics[n] for n in pending]
        for critic in chosen:
            critic.scaler.fit(data.observations)
        generators = _generators([seeds[n] for n in pending], "critic")
        trainer = SeedIQL(chosen, data, settings, generators=generators)
        seconds = train_together(
            [stages[n][0] for n in pending],
            trainer.update,
            trainer.parts,
            steps=settings.steps,
            description="critics",
        )
        trained = trainer.critic.state_dict()
        for i, critic in enumerate(chosen):
            critic.load_state_dict(of_seed(trained, i))
        return [{"seconds": seconds, "rewards": words} for _ in pending]

    fit_together(stages, fit)
    return critics


def fit_posteriors(
    directories: Directories,
    dataset: TransitionDataset,
    priors: Sequence[ActionDiffusion],
    critics: Sequence[Critic],
    settings: PosteriorSettings | None = None,
    *,
    seeds: Sequence[int],
) -> list[ActionDiffusion]:
    """`fit_posterior` for every seed, from its prior and its critic.

    Raises InputError unless there is one directory, prior and critic for each seed, priors are of
    one size, and no path of the mix is replayed or drawn in batches.
    """
    check_seeds(seeds, directories=directories, priors=priors, critics=critics)
    check_alike(priors)
    settings = settings or PosteriorSettings()
    check_settings(settings.finetune)
    given = zip(directories, priors, critics, seeds, strict=True)
    stages = [
        open_posterior(where, dataset, prior, critic, settings, seed=seed)
        for where, prior, critic, seed in given
    ]
    posteriors, data = [posterior for _, posterior in stages], dataset.to(priors[0].device)

    def fit(pending: list[int]) -> list[dict[str, Any]]:
        chosen = [(seeds[n], priors[n], critics[n], posteriors[n]) for n in pending]
        trainer = _finetuner(data, settings, chosen)
        seconds = train_together(
            [stages[n][0] for n in pending],
            trainer.update,
            trainer.parts,
            steps=settings.finetune.updates,
            description="posteriors",
            log_every=LOG_EVERY,
            checkpoint_every=CHECKPOINT_EVERY,
        )
        average, results = trainer.inner.average.module.state_dict(), []
        for i, (seed, prior, critic, posterior) in enumerate(chosen):
            posterior.denoiser.load_state_dict(of_seed(average, i))
            task = offline_rl_task(
                data, prior.diffusion, prior.denoiser, posterior.denoiser, critic
            )
            diagnostics = diagnose_policy(task, posterior, settings, seed=seed)
            results.append({"seconds": seconds, "diagnostics": diagnostics})
        return results

    fit_together(stages, fit)
    return posteriors


def _finetuner(
    data: TransitionDataset,
    settings: PosteriorSettings,
    chosen: Sequence[tuple[int, ActionDiffusion, Critic, ActionDiffusion]],
) -> SeedFinetuner:
    seeds, priors, critics, posteriors = zip(*chosen, strict=True)
    return SeedFinetuner(
        seed_task(data, priors, posteriors, critics),
        [new_log_z(data, settings, seed) for seed in seeds],
        settings.finetune,
        objective_of(settings),
        generators=_generators(seeds, "posterior"),
    )


def _generators(seeds: Sequence[int], name: str) -> Generators:
    return Generators([generator_for(s, name, device=device_for_training()) for s in seeds])
