"""What every text-to-image program begins with: prompts, reward, pipeline, draws of the prior."""

from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator

from rtb_rl.adapters.preference import clip_embedder
from rtb_rl.adapters.prompts import TextToImagePipeline
from rtb_rl.adapters.text_to_image import (
    TextToImagePrior,
    load_text_to_image,
    open_text_to_image,
)
from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image.comparison import TextToImageJob
from rtb_rl.tasks.text_to_image.evaluation import Measure, Reference, pixel_fields
from rtb_rl.tasks.text_to_image.named_rewards import named_reward
from rtb_rl.tasks.text_to_image.prompt_lists import PromptList, prompt_list, read_prompts
from rtb_rl.tasks.text_to_image.reference import PriorDraws, prior_draws
from rtb_rl.tasks.text_to_image.rewards import CheckedReward, PromptReward
from rtb_rl.tasks.text_to_image.settings import (
    SHAPES,
    SHAPES_PROMPT,
    SHAPES_REWARD,
    Budget,
    TextToImageSettings,
    budget_for,
)
from rtb_rl.tasks.text_to_image.shapes import CELLS, SIZE, cell_log_probs
from rtb_rl.tasks.text_to_image.shapes_prior import fit_shapes_prior
from rtb_rl.tasks.text_to_image.target import MakeLogZ, PromptTarget, learned_log_z
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import device_for_training


def open_text_to_image_job(
    settings: TextToImageSettings,
    *,
    program: str,
    make_log_z: MakeLogZ = learned_log_z,
    **posterior: Any,
) -> TextToImageJob:
    """Load and check all that is given, make what is not: a pipeline of shapes, prior draws.

    `posterior`: what the program changes of the budget's TextToImagePosteriorSettings. Raises
    InputError for prompts, a reward, a pipeline or a shared run that don't fit, before anything is
    trained or written.
    """
    prompts, name = prompts_of(settings), settings.reward or _default_reward(settings)
    reward = named_reward(name)
    budget = _budget(settings, posterior)
    embed = pixel_fields if settings.embedder is None else clip_embedder(settings.embedder)
    pipeline = _check(settings, prompts, name, reward)
    given = {key: value for key, value in asdict(settings).items() if key not in ("out", "share")}
    config = {**given, "prompts": list(prompts.texts), "reward": name, "program": program}
    config["settings"] = asdict(budget)
    root = settings.share or settings.out
    with Accelerator().main_process_first():
        run = Run(settings.out, config)
        if pipeline is None:
            pipeline = fit_shapes_prior(root / "prior", budget.prior, seed=settings.prior_seed)
        prior = _open(pipeline, prompts, settings, budget)
        target = PromptTarget(name, reward, prompts, make_log_z)
        draws = prior_draws(
            root / "reference",
            prior,
            target,
            budget.reference_draws,
            batch=budget.draw_batch,
            seed=settings.prior_seed,
        )
    log_probs = cell_log_probs if settings.prior == SHAPES else None
    measure = Measure(target.log_reward(prior), embed, log_probs, budget.draw_batch)
    classes = [" ".join(cell) for cell in CELLS] if settings.prior == SHAPES else []
    references = _references(draws, measure, settings.beta)
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


def _default_reward(settings: TextToImageSettings) -> str:
    if settings.prior != SHAPES:
        raise InputError(f"no reward is given for {settings.prior!r}; give --reward")
    return SHAPES_REWARD


def _budget(settings: TextToImageSettings, posterior: dict[str, Any]) -> Budget:
    """The budget of that name with what was asked for otherwise."""
    budget = budget_for(settings.budget, settings.prior)
    asked = {name: getattr(settings, name) for name in ("levels", "guidance", "draws")}
    changed = {name: value for name, value in asked.items() if value is not None}
    finetune = replace(budget.posterior.finetune, beta=settings.beta)
    finetune = replace(finetune, **posterior.pop("finetune", {}))
    tuned = replace(budget.posterior, finetune=finetune, **posterior)
    return replace(budget, posterior=tuned, **changed)


def _check(
    settings: TextToImageSettings, prompts: PromptList, name: str, reward: PromptReward
) -> TextToImagePipeline | None:
    """The pipeline where one is given; InputErrors for what would fail later."""
    if settings.share is not None and not (settings.share / "reference/results.json").exists():
        raise InputError(
            f"{settings.share} holds no finished prior and reference; finish that run first, or"
            " leave share out"
        )
    if settings.prior == SHAPES:
        generator = generator_for(0, "check")
        images = torch.rand((2, 3, SIZE, SIZE), generator=generator)
        texts = [prompts.texts[0]] * 2
        CheckedReward(reward)(images, texts, [dict(prompts.metadata[0])] * 2)
        return None
    if name.startswith("cell:"):
        raise InputError(f"the reward {name!r} is of shapes alone; give another for your pipeline")
    return load_text_to_image(settings.prior, ancestral=settings.ancestral).to(
        device_for_training()
    )


def _open(
    pipeline: TextToImagePipeline,
    prompts: PromptList,
    settings: TextToImageSettings,
    budget: Budget,
) -> TextToImagePrior:
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


def _references(draws: PriorDraws, measure: Measure, beta: float) -> list[Reference]:
    """The target of each prompt."""
    whole, found = draws.weighted(beta), []
    for number, (x0, log_reward) in enumerate(zip(draws.x0, draws.log_reward, strict=True)):
        rows = slice(number, number + 1)
        own = replace(whole, x0=whole.x0[rows], log_weight=whole.log_weight[rows])
        found.append(Reference(own, measure(x0, number, log_reward)))
    return found
