"""Fitting an image posterior: a stage that leaves an ordinary diffusers pipeline."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.lora import WithoutLora, add_lora, has_attention, shared_view
from rtb_rl.adapters.pipelines import PipelinePrior
from rtb_rl.adapters.schedulers import scheduler_grid
from rtb_rl.adapters.unets import denoiser_from_unet
from rtb_rl.core import PriorInLastSteps, Sampler, conditions, rollout, steps_of_prior
from rtb_rl.errors import InputError
from rtb_rl.tasks.image.export import export_posterior
from rtb_rl.tasks.image.images import to_images
from rtb_rl.tasks.image.start import fit_start, start_conditions
from rtb_rl.tasks.image.target import ImageTarget, check_reward
from rtb_rl.tasks.image.trainers import (
    MakeTrainer,
    PosteriorSettings,
    relative_trajectory_balance,
)
from rtb_rl.training.calls import NetworkCalls
from rtb_rl.training.diagnostics import diagnose
from rtb_rl.training.posterior_stage import (
    Trainer,
    fit_posterior_stage,
    open_posterior_run,
)
from rtb_rl.training.processes import own_name
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import fingerprint
from rtb_rl.training.task import Task

with extra("image"):
    from diffusers.models.unets.unet_2d import UNet2DModel

GRID = 64  # images of a grid in TensorBoard
WEIGHED = 1000  # paths that are drawn and weighed together


@dataclass(frozen=True)
class ImagePosterior:
    """A posterior with what it was made from; `results` are those of its run."""

    task: Task
    unet: UNet2DModel
    results: Mapping[str, Any]

    @property
    def sampler(self) -> Sampler:
        return Sampler(self.task.diffusion, self.task.posterior)


def posterior_task(
    prior: PipelinePrior, target: ImageTarget, settings: PosteriorSettings, *, seed: int
) -> tuple[Task, UNet2DModel]:
    """The task of a target, and the U-Net that is trained; it starts as the prior.

    InputError for adapters where the target needs inputs that the prior's network lacks.
    """
    unet, scheduler = prior.pipeline.unet, prior.pipeline.scheduler
    grid = scheduler_grid(scheduler, prior.diffusion.levels)
    adapted = settings.lora_rank is not None
    if adapted:
        check_adapters(unet, conditional=target.is_conditional)
    trained = shared_view(unet) if adapted else target.widen(unet)
    trained.requires_grad_(not adapted)
    if settings.lora_rank is not None:
        add_lora(trained, rank=settings.lora_rank, generator=generator_for(seed, "lora"))
    if settings.gradient_checkpointing:
        trained.enable_gradient_checkpointing()
    after = denoiser_from_unet(
        trained, scheduler, grid, encode=target.encode, precision=prior.precision
    ).to(prior.diffusion.signal.device)
    before = WithoutLora(after) if adapted else prior.denoiser
    if settings.start is not None:
        after = PriorInLastSteps(after, before)
    task = Task(
        target.name, prior.diffusion, before, after, target.log_reward, target.draw_conditions
    )
    return task, trained


def check_adapters(unet: UNet2DModel, *, conditional: bool) -> None:
    """InputError unless adapters on this U-Net can make a posterior, `conditional` or not."""
    if conditional:
        raise InputError(
            "the target has conditions that the prior's network has no input for, and adapters"
            " add none; leave lora_rank out"
        )
    if not has_attention(unet):
        raise InputError(
            "adapters go on attention layers and the prior's network has none; leave lora_rank"
            " out, or give a prior with attention"
        )


def fit_posterior(
    directory: str | Path,
    prior: PipelinePrior,
    target: ImageTarget,
    settings: PosteriorSettings | None = None,
    *,
    seed: int = 0,
    make_trainer: MakeTrainer = relative_trajectory_balance,
) -> ImagePosterior:
    """The posterior of a prior and a target, trained by relative trajectory balance.

    The directory holds diagnostics in results.json and, where every weight was trained, a pipeline
    that plain diffusers loads; else the adapters in diffusers' format. Raises InputError for a
    reward that does not return one number an image and for settings that don't fit, before anything
    is written.
    """
    settings = settings or PosteriorSettings()
    accelerator = Accelerator()
    task, unet = posterior_task(prior, target, settings, seed=seed)
    check_reward(task, seed=seed)
    if settings.start is not None:
        start_conditions(target, _device(task))
    config = _config(prior, target, settings, make_trainer, seed)

    def new_trainer() -> Trainer:
        name = own_name("posterior", accelerator)
        generator = generator_for(seed, *name, device=_device(task))
        return make_trainer(task, target, settings, generator, accelerator)

    new_trainer()  # settings that don't fit are refused here
    run = open_posterior_run(Path(directory), config, accelerator)
    networks, finetune = {prior.pipeline.unet, unet}, settings.finetune
    start = partial(
        fit_start, prior=prior, target=target, task=task, settings=settings.start, seed=seed
    )
    results = fit_posterior_stage(
        run,
        task,
        new_trainer,
        networks=networks,
        steps=finetune.updates,
        log_every=settings.log_every,
        observe=partial(_log_grid, task, settings, seed),
        diagnose=partial(_diagnostics, task, settings, seed),
        accelerator=accelerator,
        begin=partial(start, Path(directory) / "start", beta=finetune.beta, networks=networks),
    )
    if accelerator.is_main_process:
        export_posterior(
            run.directory,
            prior,
            unet,
            name=target.name,
            beta=finetune.beta,
            prior_steps=steps_of_prior(task.posterior),
            diagnostics=results["diagnostics"],
        )
    return ImagePosterior(task, unet, results)


def _config(
    prior: PipelinePrior,
    target: ImageTarget,
    settings: PosteriorSettings,
    make_trainer: MakeTrainer,
    seed: int,
) -> dict[str, Any]:
    """What a run's directory belongs to."""
    given = {"posterior": asdict(settings), "trainer": make_trainer.__name__, "seed": seed}
    made_from = {"prior": fingerprint(prior.pipeline.unet), "levels": prior.diffusion.levels}
    return {"target": target.name, **target.facts, **given, **made_from}


def _diagnostics(task: Task, settings: PosteriorSettings, seed: int) -> dict[str, float]:
    device = _device(task)
    rows, samples = settings.diagnostic_rows, settings.diagnostic_samples
    one, _ = task.draw_conditions(1, generator=generator_for(seed, "probe", device=device))
    if conditions.count(one) is None:
        rows, samples = 1, rows * samples
    return diagnose(
        task,
        task.posterior,
        settings.finetune.beta,
        rows=rows,
        samples=samples,
        batch=WEIGHED,
        generator=generator_for(seed, "diagnostics", device=device),
    )


@torch.no_grad()
def _log_grid(
    task: Task, settings: PosteriorSettings, seed: int, run: Run, calls: NetworkCalls, step: int
) -> None:
    """Samples to TensorBoard: of the prior once, of the posterior as it is. Not counted."""
    if step % settings.grid_every:
        return
    spent = calls.total
    denoisers = {"posterior": task.posterior}
    if step == settings.grid_every:
        denoisers["prior"] = task.prior
    for name, denoiser in denoisers.items():
        generator = generator_for(seed, "grid", device=_device(task))
        condition, _ = task.draw_conditions(GRID, generator=generator)
        paths = rollout(task.diffusion, denoiser, condition, GRID, generator=generator)
        run.log_images(step, f"samples/{name}", to_images(paths.x0))
    calls.total = spent


def _device(task: Task) -> torch.device:
    return next(task.posterior.parameters()).device
