"""Fitting a posterior of gaps: p(gap | left) r(gap)^beta / Z, by relative trajectory balance."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtb_rl.core import OnDemand, Sampler, TokenLogits
from rtb_rl.nn.transformer import GatedTransformer
from rtb_rl.tasks.language.denoiser import GatedLogits, TextPrior, fading
from rtb_rl.tasks.language.prompts import Gap, Prompts
from rtb_rl.tasks.language.rewards import TextReward, token_log_reward
from rtb_rl.tasks.language.trainers import (
    MakeTrainer,
    TextPosteriorSettings,
    relative_trajectory_balance,
)
from rtb_rl.training.calls import NetworkCalls
from rtb_rl.training.ema import TrainedState
from rtb_rl.training.loop import train
from rtb_rl.training.run import Run
from rtb_rl.training.scoring import score
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import complete, fingerprint
from rtb_rl.training.task import Task

SHOWN = 4  # gaps whose infills are logged as text


@dataclass(frozen=True)
class TextPosterior:
    """A trained posterior; `network` is what was trained."""

    prior: TextPrior
    task: Task
    network: nn.Module
    results: Mapping[str, Any]

    @property
    def sampler(self) -> Sampler:
        return Sampler(self.task.diffusion, self.task.posterior)


def text_task(
    prior: TextPrior,
    prompts: Prompts,
    reward: TextReward,
    settings: TextPosteriorSettings,
    *,
    name: str = "infilling",
    seed: int = 0,
) -> tuple[Task, nn.Module]:
    """The task, and the network that is trained.

    The posterior starts as the prior, which is not shown the right context; to the posterior it
    fades in.
    """
    network = copy.deepcopy(prior.network).requires_grad_(settings.lora_rank is None)
    before: nn.Module = prior.left_only()
    if settings.lora_rank is not None:
        from rtb_rl.adapters.lora import WithoutLora, add_lora  # peft takes seconds to import

        targets, generator = settings.lora_targets, generator_for(seed, "lora")
        frozen = {id(p): p for p in prior.network.parameters()}
        network = copy.deepcopy(prior.network, frozen)
        add_lora(network, rank=settings.lora_rank, targets=targets, generator=generator)
        before = WithoutLora(prior.left_only(network))
    trained = fading(network, prior.frame.codec.pad)
    task = Task(
        name,
        prior.diffusion,
        OnDemand(before),
        OnDemand(prior.both_sides(trained)),
        token_log_reward(reward, prompts),
        prompts.draw,
    )
    return task, trained


def fit_text_posterior(
    directory: str | Path,
    prior: TextPrior,
    prompts: Prompts,
    reward: TextReward,
    settings: TextPosteriorSettings | None = None,
    *,
    make_trainer: MakeTrainer | None = None,
    start: MakeTrainer | None = None,
    told: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> TextPosterior:
    """A posterior of the gaps of these prompts, trained in this directory or loaded from it.

    `make_trainer`: trajectory balance unless given. `start`: what trains it before that, in start/;
    not given: nothing, it begins as the prior. `told`: what else the directory belongs to, such as
    the name of the reward. Raises InputError for a reward that does not return one number a text,
    NonFiniteError for NaN, before anything is written.
    """
    settings = settings or TextPosteriorSettings()
    main = make_trainer or relative_trajectory_balance()
    task, network = text_task(prior, prompts, reward, settings, seed=seed)
    _check_reward(task, seed, next(network.parameters()).device)
    config = {"posterior": asdict(settings), "seed": seed, "prior": fingerprint(prior.network)}
    run = Run(directory, {**config, "gaps": len(prompts.gaps), **(told or {})})

    fitted = partial(_fit, prior, task, network, prompts, settings, seed)

    def fit() -> dict[str, Any]:
        if start is None:
            return fitted(run, main)
        trained = [p for p in network.parameters() if p.requires_grad]
        first, part = run.stage("start", config), TrainedState(network)
        complete(first, network, partial(fitted, first, start), part=part)
        for parameter in trained:
            parameter.requires_grad_(True)
        before, after = first.results or {}, fitted(run, main)
        return {name: after[name] + before[name] for name in after}

    complete(run, network, fit, part=TrainedState(network))
    return TextPosterior(prior, task, network, run.results or {})


def _fit(
    prior: TextPrior,
    task: Task,
    network: nn.Module,
    prompts: Prompts,
    settings: TextPosteriorSettings,
    seed: int,
    run: Run,
    make_trainer: MakeTrainer,
) -> dict[str, Any]:
    """Train the posterior and give it the averaged weights; what that cost."""
    device = next(network.parameters()).device
    generator = generator_for(seed, "text posterior", device=device)
    trainer, updates = make_trainer(task, prompts, settings, generator)
    calls = NetworkCalls({trunk(prior.network), trunk(network)})

    def observe(step: int) -> None:
        if step % settings.text_every == 0:
            spent = calls.total
            log_infills(run, step, task, prompts, seed=seed)
            calls.total = spent

    seconds = train(
        run,
        trainer.update,
        {**trainer.parts, "network_calls": calls},
        steps=updates,
        description=run.directory.name,
        log_every=settings.log_every,
        checkpoint_every=5 * settings.log_every,
        observe=observe,
    )
    calls.stop()
    task.posterior.load_state_dict(trainer.average.module.state_dict())
    return {"seconds": seconds, "network_calls": calls.total}


def trunk(network: nn.Module) -> nn.Module:
    """What is evaluated once for each sequence, however its answers are asked for."""
    while isinstance(network, TokenLogits | GatedTransformer | GatedLogits):
        network = network.network  # type: ignore[assignment]
    return getattr(network, "trunk", network)


@torch.no_grad()
def log_infills(run: Run, step: int, task: Task, prompts: Prompts, *, seed: int) -> None:
    """Infills of the posterior as it is, as text in TensorBoard, always of the same gaps."""
    device = next(task.posterior.parameters()).device
    generator = generator_for(seed, "shown", device=device)
    condition, _ = task.draw_conditions(SHOWN, generator=generator)
    assert isinstance(condition, dict)
    x0 = Sampler(task.diffusion, task.posterior).sample(condition, 1, generator=generator)
    gaps = prompts.written(x0.squeeze(1), condition)
    run.log_text(step, "infills", "\n\n".join(shown(gap) for gap in gaps))


def shown(gap: Gap) -> str:
    """One line of Markdown with the gap in bold."""
    return f"{gap.left} **{gap.middle}** {gap.right}"


def _check_reward(task: Task, seed: int, device: torch.device) -> None:
    generator = generator_for(seed, "check", device=device)
    condition, _ = task.draw_conditions(2, generator=generator)
    x0 = Sampler(task.diffusion, task.prior).sample(condition, 1, generator=generator)
    score(task, x0.squeeze(1), condition)
