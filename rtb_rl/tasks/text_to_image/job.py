"""What every text-to-image program begins with: prompts, reward, pipeline, draws of the prior."""

import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from rtb_rl.adapters.preference import clip_embedder
from rtb_rl.adapters.prompts import TextToImagePipeline
from rtb_rl.adapters.text_to_image import (
    TextToImagePrior,
    load_text_to_image,
    open_text_to_image,
)
from rtb_rl.core.gaussian import SIGNAL_WARNING
from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image.comparison import TextToImageJob
from rtb_rl.tasks.text_to_image.evaluation import Measure, Reference, pixel_fields
from rtb_rl.tasks.text_to_image.named_rewards import named_reward
from rtb_rl.tasks.text_to_image.posterior import check_start
from rtb_rl.tasks.text_to_image.prompt_lists import PromptList, prompt_list, read_prompts
from rtb_rl.tasks.text_to_image.reference import PriorDraws, prior_draws
from rtb_rl.tasks.text_to_image.settings import (
    SHAPES,
    SHAPES_PROMPT,
    SHAPES_REWARD,
    Budget,
    TextToImageSettings,
    budget_for,
)
from rtb_rl.tasks.text_to_image.shapes import CELLS, cell_log_probs
from rtb_rl.tasks.text_to_image.shapes_prior import fit_shapes_prior, new_shapes_pipeline
from rtb_rl.tasks.text_to_image.target import MakeLogZ, PromptTarget, learned_log_z
from rtb_rl.tasks.text_to_image.trainers import nominal_beta
from rtb_rl.training.equal_calls import Spent
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.settings import check_beta, check_settings
from rtb_rl.training.stage import device_for_training


def open_text_to_image_job(
    settings: TextToImageSettings,
    *,
    program: str,
    make_log_z: MakeLogZ = learned_log_z,
    spent: Spent | None = None,
    **posterior: Any,
) -> TextToImageJob:
    """Load and check all that is given, make what is not: a pipeline of shapes, prior draws.

    `spent`: what the methods of the job may spend; rows of a run belong to one budget. `posterior`:
    what the program changes of the budget's TextToImagePosteriorSettings. Raises InputError for
    prompts, a reward, a pipeline or a shared run that don't fit, before anything is trained or
    written.
    """
    check_beta(settings.beta)
    prompts, name = prompts_of(settings), reward_of(settings)
    reward = named_reward(name)
    budget = _budget(settings, posterior)
    _check_finished(settings)
    embed = pixel_fields if settings.embedder is None else clip_embedder(settings.embedder)
    prior = _open(_pipeline(settings, budget), prompts, settings, budget)
    _say_what_is_left(prior, budget)
    target = PromptTarget(name, reward, prompts, make_log_z)
    log_probs = cell_log_probs if settings.prior == SHAPES else None
    measures = [embed] if log_probs is None else [embed, log_probs]
    _check_measures(target, prior, measures, max(2, budget.draw_batch))
    make_log_z(prior.prompts, budget.posterior.finetune.mix.total, generator_for(0, "check"))
    given = {key: value for key, value in asdict(settings).items() if key not in ("out", "share")}
    facts = {**prompts.facts, "reward": name, "settings": asdict(budget), "program": program}
    facts |= {} if spent is None else {"spent": spent._asdict()}
    root = settings.share or settings.out
    with Accelerator().main_process_first():
        if settings.share is None:
            Run(settings.out, {**given, **facts})
        if budget.prior is not None:
            made = fit_shapes_prior(root / "prior", budget.prior, seed=settings.prior_seed)
            prior = _open(made, prompts, settings, budget)
        draws = prior_draws(
            root / "reference",
            prior,
            target,
            budget.reference_draws,
            batch=budget.draw_batch,
            seed=settings.prior_seed,
        )
        run = Run(settings.out, {**given, **facts})
    measure = Measure(target.log_reward(prior), embed, log_probs, budget.draw_batch)
    classes = [" ".join(cell) for cell in CELLS] if settings.prior == SHAPES else []
    beta = nominal_beta(budget.posterior, prior.diffusion.event_shape)
    references = _references(draws, measure, beta)
    return TextToImageJob(settings, budget, run, prior, target, draws, measure, references, classes)


def prompts_of(settings: TextToImageSettings) -> PromptList:
    """Those given, or that of shapes. InputError for none, and for two lists."""
    if settings.prompts and settings.prompt_file is not None:
        raise InputError("both prompts and a prompt file are given; give one of them")
    if settings.prompt_file is not None:
        return read_prompts(settings.prompt_file)
    if settings.prompts:
        return prompt_list(settings.prompts)
    if settings.prior != SHAPES:
        raise InputError(
            f"no prompt is given for {settings.prior!r}; give --prompts or --prompt-file"
        )
    return prompt_list(SHAPES_PROMPT)


def reward_of(settings: TextToImageSettings) -> str:
    """The name of that given, or of that of shapes. InputError for none, and for one that is of
    shapes alone with another pipeline.
    """
    if settings.prior == SHAPES:
        return settings.reward or SHAPES_REWARD
    if settings.reward is None:
        raise InputError(f"no reward is given for {settings.prior!r}; give --reward")
    if settings.reward.startswith("cell:"):
        raise InputError(
            f"the reward {settings.reward!r} is of shapes alone; give another for your pipeline"
        )
    return settings.reward


def _budget(settings: TextToImageSettings, posterior: dict[str, Any]) -> Budget:
    """The budget of that name with what was asked for otherwise. InputError for what can't be."""
    if settings.draws is not None and settings.draws < 2:
        raise InputError(f"{settings.draws} draws can't be compared; give 2 or more")
    if settings.ancestral and settings.prior == SHAPES:
        raise InputError("shapes are sampled with densities already; leave --ancestral out")
    if (rank := posterior.get("lora_rank")) is not None and rank < 1:
        raise InputError(f"adapters of rank {rank} hold nothing; give a rank of 1 or more")
    budget = budget_for(settings.budget, settings.prior)
    asked = {name: getattr(settings, name) for name in ("levels", "guidance", "draws")}
    changed = {name: value for name, value in asked.items() if value is not None}
    finetune = replace(budget.posterior.finetune, beta=settings.beta)
    finetune = replace(finetune, **posterior.pop("finetune", {}))
    tuned = replace(budget.posterior, finetune=finetune, **posterior)
    for part in (tuned.finetune, tuned.start):
        check_settings(part)
    check_start(tuned)
    return replace(budget, posterior=tuned, **changed)


def _check_finished(settings: TextToImageSettings) -> None:
    """InputError where the run to share lacks a stage."""
    if settings.share is None:
        return
    stages = ["reference", *["prior"] * (settings.prior == SHAPES)]
    lacking = [name for name in stages if not (settings.share / name / "results.json").exists()]
    if lacking:
        raise InputError(
            f"{settings.share} holds no finished run for this prior: {', '.join(lacking)} not"
            " complete; finish that run first, or leave share out"
        )


def _pipeline(settings: TextToImageSettings, budget: Budget) -> TextToImagePipeline:
    """That given, or one of shapes before it is trained, which can be checked like it."""
    if budget.prior is not None:
        pipeline = new_shapes_pipeline(budget.prior, generator=generator_for(0, "check"))
    else:
        pipeline = load_text_to_image(settings.prior, ancestral=settings.ancestral)
    return pipeline.to(device_for_training())


@torch.no_grad()
def _check_measures(
    target: PromptTarget,
    prior: TextToImagePrior,
    measures: list[Callable[[Tensor], Tensor]],
    batch: int,
) -> None:
    """InputError or NonFiniteError for a reward, or another measure, that doesn't suit images of
    this pipeline or any of the prompts; tried on noise, `batch` prompts at once.
    """
    device, factor = prior.diffusion.signal.device, prior.pipeline.vae_scale_factor
    count, generator = len(target.prompts), generator_for(0, "check", device=device)
    shape = (max(2, min(count, batch)), 3, *(factor * n for n in prior.diffusion.event_shape[1:]))
    images = torch.rand(shape, generator=generator, device=device)
    for condition in torch.arange(max(2, count), device=device).clamp(max=count - 1).split(batch):
        _check_reward(target, prior, images[: len(condition)], condition)
    for measure in measures:
        measure(images)


def _check_reward(
    target: PromptTarget, prior: TextToImagePrior, images: Tensor, condition: Tensor
) -> None:
    try:
        target.log_reward(prior).of_images(images, condition)
    except InputError:
        raise
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        first, last = (target.prompts.texts[int(condition[i])] for i in (0, -1))
        raise InputError(
            f"the reward {target.name!r} fails on images {tuple(images.shape)} of this pipeline"
            f" ({reason}) for the prompts {first!r} to {last!r}; give one made for such images"
        ) from error


def _open(
    pipeline: TextToImagePipeline,
    prompts: PromptList,
    settings: TextToImageSettings,
    budget: Budget,
) -> TextToImagePrior:
    with warnings.catch_warnings():
        # _say_what_is_left names the flag that helps; of another schedule there is no choice
        warnings.filterwarnings("ignore", message="the schedule leaves signal")
        return open_text_to_image(
            pipeline,
            list(prompts.texts),
            levels=budget.levels,
            guidance=budget.guidance,
            negative=settings.negative,
            size=settings.size,
            precision=torch.bfloat16 if settings.half_precision else None,
            decode_batch=budget.draw_batch,
        )


def _say_what_is_left(prior: TextToImagePrior, budget: Budget) -> None:
    """Warn, once, where the chain keeps signal at its last level and nothing is done about it."""
    left = prior.diffusion.signal_left
    if left > SIGNAL_WARNING and not budget.posterior.learned_start:
        Console(stderr=True).print(
            f"warning: signal {left:.3f} is left at the last level, so that no posterior with the"
            " prior's first noise is exact; in rtb_text_to_image --learned-start learns another",
            highlight=False,
        )


def _references(draws: PriorDraws, measure: Measure, beta: float) -> list[Reference]:
    """The target of each prompt."""
    whole, found = draws.weighted(beta), []
    for number, (x0, log_reward) in enumerate(zip(draws.x0, draws.log_reward, strict=True)):
        rows = slice(number, number + 1)
        own = replace(whole, x0=whole.x0[rows], log_weight=whole.log_weight[rows])
        found.append(Reference(own, measure(x0, number, log_reward)))
    return found
