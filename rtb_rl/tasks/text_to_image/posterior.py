"""Fitting a text-to-image posterior: a stage that leaves LoRA weights, or a pipeline."""

import copy
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from rtb_rl.adapters.lora import add_lora, shared_view
from rtb_rl.adapters.text_to_image import TextToImagePrior, posterior_denoiser
from rtb_rl.core import PriorInLastSteps, Sampler, StandardStart, StartStep, acting_network
from rtb_rl.errors import InputError
from rtb_rl.nn import LearnedStart
from rtb_rl.tasks.image.target import check_reward
from rtb_rl.tasks.text_to_image.export import export_posterior
from rtb_rl.tasks.text_to_image.reference import prior_facts
from rtb_rl.tasks.text_to_image.start import fit_start
from rtb_rl.tasks.text_to_image.target import DrawPrompts, LatentReward, PromptTarget
from rtb_rl.tasks.text_to_image.trainers import (
    MakeTrainer,
    TextToImagePosteriorSettings,
    nominal_beta,
    relative_trajectory_balance,
)
from rtb_rl.training.calls import NetworkCalls
from rtb_rl.training.diagnostics import diagnose
from rtb_rl.training.posterior_stage import Trainer, fit_posterior_stage, open_posterior_run
from rtb_rl.training.processes import own_name
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.task import Task

DRAW_BATCH = 500  # images drawn at once where the settings don't say
SHOWN_PROMPTS, SHOWN_IMAGES = 4, 4  # in TensorBoard


@dataclass(frozen=True)
class TextToImagePosterior:
    """A posterior with what it was made from; `results` are those of its run."""

    prior: TextToImagePrior
    task: Task
    unet: nn.Module
    results: Mapping[str, Any]

    @property
    def sampler(self) -> Sampler:
        """Draws latents for numbers of prompts; `prior.decode` makes them images."""
        return Sampler(self.task.diffusion, self.task.posterior)


def text_to_image_task(
    prior: TextToImagePrior,
    target: PromptTarget,
    settings: TextToImagePosteriorSettings,
    *,
    seed: int,
) -> tuple[Task, nn.Module]:
    """The task of a target, and the U-Net that is trained; it starts as the prior.

    With adapters it is the prior's own U-Net seen a second time: no weight is held twice.
    InputError for settings that exclude each other.
    """
    unet: Any = prior.pipeline.unet
    check_start(settings)
    if settings.lora_rank is None:
        trained = copy.deepcopy(unet).float().requires_grad_(True)
    else:
        generator = generator_for(seed, "lora")
        trained = shared_view(unet)
        rank, targets = settings.lora_rank, settings.lora_targets
        add_lora(trained, rank=rank, targets=targets, generator=generator)
    if settings.gradient_checkpointing:
        trained.enable_gradient_checkpointing()
    diffusion, before = prior.diffusion, prior.denoiser
    after = posterior_denoiser(prior, trained)
    if settings.learned_start:
        diffusion = StartStep(prior.diffusion)
        before = StandardStart(before, diffusion)
        after = LearnedStart(after, diffusion).to(prior.diffusion.signal.device)
    if settings.start is not None:
        after = PriorInLastSteps(after, before)
    log_reward, draw = target.log_reward(prior), DrawPrompts(len(target.prompts))
    return Task(target.name, diffusion, before, after, log_reward, draw), trained


def check_start(settings: TextToImagePosteriorSettings) -> None:
    """InputError for two starts, as shapes would have with a learned one."""
    if settings.start is not None and settings.learned_start:
        raise InputError(
            "a start from draws of the prior and a learned law of the first noise don't go"
            " together; leave one out"
        )


def fit_text_to_image(
    directory: str | Path,
    prior: TextToImagePrior,
    target: PromptTarget,
    settings: TextToImagePosteriorSettings | None = None,
    *,
    seed: int = 0,
    make_trainer: MakeTrainer = relative_trajectory_balance,
) -> TextToImagePosterior:
    """The posterior of a prior and a target, trained by relative trajectory balance.

    The directory holds diagnostics in results.json, and lora/ or pipeline/ for plain diffusers.
    Raises InputError for a reward that does not return one number an image and for settings that
    don't fit, before anything is written.
    """
    settings = settings or TextToImagePosteriorSettings()
    accelerator = Accelerator()
    task, unet = text_to_image_task(prior, target, settings, seed=seed)
    check_reward(task, seed=seed)
    config = _config(prior, target, settings, make_trainer, seed)

    def new_trainer() -> Trainer:
        name = own_name("text-to-image posterior", accelerator)
        generator = generator_for(seed, *name, device=prior.diffusion.signal.device)
        return make_trainer(task, target, prior.prompts, settings, generator, accelerator)

    new_trainer()  # settings that don't fit are refused here
    run = open_posterior_run(Path(directory), config, accelerator)
    networks = {prior.denoiser, acting_network(task.posterior)}
    start = partial(
        fit_start, prior=prior, target=target, task=task, settings=settings.start, seed=seed
    )
    results = fit_posterior_stage(
        run,
        task,
        new_trainer,
        networks=networks,
        steps=settings.finetune.updates,
        log_every=settings.log_every,
        observe=partial(_show, task, prior, settings, seed),
        diagnose=partial(_diagnostics, task, target, settings, seed),
        accelerator=accelerator,
        begin=partial(
            start,
            Path(directory) / "start",
            beta=nominal_beta(settings, task.diffusion.event_shape),
            networks=networks,
            batch=settings.finetune.draw_batch or DRAW_BATCH,
        ),
    )
    posterior = TextToImagePosterior(prior, task, unet, results)
    if accelerator.is_main_process:
        beta = nominal_beta(settings, task.diffusion.event_shape)
        export_posterior(
            run.directory, prior, task, unet, beta=beta, diagnostics=results["diagnostics"]
        )
    return posterior


def _config(
    prior: TextToImagePrior,
    target: PromptTarget,
    settings: TextToImagePosteriorSettings,
    make_trainer: MakeTrainer,
    seed: int,
) -> dict[str, Any]:
    """What a run's directory belongs to."""
    given = {"posterior": asdict(settings), "trainer": make_trainer.__name__, "seed": seed}
    asked = {"target": target.name, "log_z": target.make_log_z.__name__, **target.prompts.facts}
    return {**asked, **given, **prior_facts(prior)}


def _diagnostics(
    task: Task, target: PromptTarget, settings: TextToImagePosteriorSettings, seed: int
) -> dict[str, float]:
    return diagnose(
        task,
        task.posterior,
        nominal_beta(settings, task.diffusion.event_shape),
        rows=len(target.prompts),
        samples=settings.diagnostic_samples,
        batch=settings.finetune.draw_batch,
        generator=generator_for(seed, "diagnostics", device=_device(task)),
    )


@torch.no_grad()
def _show(
    task: Task,
    prior: TextToImagePrior,
    settings: TextToImagePosteriorSettings,
    seed: int,
    run: Run,
    calls: NetworkCalls,
    step: int,
) -> None:
    """Images of the first prompts from one seed, and their rewards. Not counted as calls."""
    if step % settings.grid_every:
        return
    spent, rewards = calls.total, {}
    assert isinstance(task.log_reward, LatentReward)
    denoisers = {"posterior": task.posterior}
    if step == settings.grid_every:
        denoisers["prior"] = task.prior
    for number, text in enumerate(prior.prompts.texts[:SHOWN_PROMPTS]):
        condition = torch.tensor([number], device=_device(task))
        for name, denoiser in denoisers.items():
            generator = generator_for(seed, "grid", number, device=_device(task))
            sampler = Sampler(task.diffusion, denoiser)
            images = prior.decode(sampler.sample(condition, SHOWN_IMAGES, generator=generator)[0])
            run.log_images(step, f"{name}/{number} {_tag(text)}", images)
            if name == "posterior":
                found = task.log_reward.of_images(images, condition.expand(len(images)))
                rewards[f"reward/{number} {_tag(text)}"] = float(found.mean())
    run.log(step, rewards)
    calls.total = spent


def _tag(text: str) -> str:
    """A prompt as part of a name in TensorBoard."""
    return re.sub(r"\W+", " ", text)[:40].strip()


def _device(task: Task) -> torch.device:
    return next(task.posterior.parameters()).device
