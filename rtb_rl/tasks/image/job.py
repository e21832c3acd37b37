"""What every image program begins with: data, prior, classifiers, target, reference."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator

from rtb_rl.adapters.pipelines import PipelinePrior
from rtb_rl.errors import InputError
from rtb_rl.nn.convolution import ConvClassifier
from rtb_rl.tasks.image.classifier import fit_classifier
from rtb_rl.tasks.image.comparison import ImageJob
from rtb_rl.tasks.image.evaluation import Judge, Reference
from rtb_rl.tasks.image.images import ImageDataset, load_images
from rtb_rl.tasks.image.posterior import check_adapters
from rtb_rl.tasks.image.prior import (
    fit_prior,
    foreign_prior,
    new_scheduler,
    new_unet,
    prior_draws,
)
from rtb_rl.tasks.image.settings import Budget, ImageSettings, budget_for
from rtb_rl.tasks.image.target import ImageTarget, class_target, every_class_target
from rtb_rl.training.equal_calls import Spent
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.settings import check_beta, check_settings
from rtb_rl.training.stage import device_for_training


def open_image_job(
    settings: ImageSettings, *, program: str, spent: Spent | None = None, **posterior: Any
) -> ImageJob:
    """Load and check all that is given, fit what is not: prior, classifiers, prior draws.

    `spent`: what the methods of the job may spend; rows of a run belong to one budget. `posterior`:
    what the program changes of the budget's PosteriorSettings. Raises InputError for
    data, classes, a pipeline or a shared run that don't fit, before anything is trained or written.
    """
    check_beta(settings.beta)
    data = load_images(settings.data).to(device_for_training())
    labels = target_labels(settings.target, data)
    budget = _budget(settings, data, posterior)
    given = {name: value for name, value in asdict(settings).items() if name != "out"}
    facts = {"data_sha256": data.sha256, "settings": asdict(budget), "program": program}
    facts |= {} if spent is None else {"spent": spent._asdict()}
    prior = None if settings.prior is None else _foreign(settings, budget, data)
    _check_unet(budget, data, prior, conditional=labels is None)
    if settings.share is not None:
        _check_finished(settings)
    root = settings.share or settings.out
    with Accelerator().main_process_first():
        if settings.share is None:
            Run(settings.out, {**given, **facts})
        if prior is None:
            prior = fit_prior(root / "prior", data, budget.prior, seed=settings.prior_seed)
        classifier = fit_classifier(
            root / "classifier", data, budget.classifier, seed=settings.prior_seed
        )
        judge = fit_classifier(root / "judge", data, budget.judge, seed=settings.prior_seed + 1)
        draws = prior_draws(
            root / "reference", prior, budget.reference_draws, seed=settings.prior_seed
        )
        run = Run(settings.out, {**given, **facts})
    target, judged = (_target(one, labels) for one in (classifier, judge))
    scorer = Judge(judge, target.log_reward, judged.log_reward)
    rows = [None] if labels is not None else list(torch.arange(len(data.classes)).split(1))
    references = [
        Reference.of(
            draws, scorer, None if row is None else row.to(draws.device), beta=settings.beta
        )
        for row in rows
    ]
    return ImageJob(
        settings, budget, run, data, prior, labels, classifier, target, scorer, references
    )


def target_labels(target: str, data: ImageDataset) -> tuple[int, ...] | None:
    """The classes that a target names, None for each of them; InputError for unknown ones."""
    count = len(data.classes)
    named = {"even": tuple(range(0, count, 2)), "odd": tuple(range(1, count, 2)), "each": None}
    if target not in named:
        words = [word.strip() for word in target.split(",")]
        return tuple(dict.fromkeys(_label(word, data) for word in words))
    if named[target] == ():
        raise InputError(f"{data.name} has {count} class, none of them {target}; give its label")
    return named[target]


def _label(word: str, data: ImageDataset) -> int:
    """The label of a class given by name, or else by number."""
    is_number = word not in data.classes and word.isdecimal()
    try:
        return data.label(int(word) if is_number else word)
    except InputError as error:
        raise InputError(
            f"{error}; give one, or even, odd, each, or several such as 1,7"
        ) from error


def _budget(settings: ImageSettings, data: ImageDataset, posterior: Mapping[str, Any]) -> Budget:
    """The budget of that name with what was asked for otherwise. InputError for what can't be."""
    if settings.draws is not None and settings.draws < 2:
        raise InputError(f"{settings.draws} draws can't be compared; give 2 or more")
    if settings.unclipped and settings.prior is None:
        raise InputError(
            "--unclipped is of a pipeline given as --prior, and none is; leave it out or give one"
        )
    if (rank := posterior.get("lora_rank")) is not None and rank < 1:
        raise InputError(f"adapters of rank {rank} hold nothing; give a rank of 1 or more")
    budget = budget_for(settings.budget, data)
    if settings.levels is not None:
        budget = replace(budget, prior=replace(budget.prior, levels=settings.levels))
    if settings.draws is not None:
        budget = replace(budget, draws=settings.draws)
    finetune = replace(budget.posterior.finetune, beta=settings.beta)
    tuned = replace(budget.posterior, finetune=finetune, **posterior)
    for part in (tuned.finetune, tuned.start):
        check_settings(part)
    return replace(budget, posterior=tuned)


def _check_unet(
    budget: Budget, data: ImageDataset, prior: PipelinePrior | None, *, conditional: bool
) -> None:
    """InputError for images or levels that a prior of our own can't have, and for adapters that
    the prior's network has no place for.
    """
    if prior is not None:
        unet = prior.pipeline.unet
    else:
        new_scheduler(budget.prior.levels)
        unet = new_unet(data.shape, budget.prior, generator=generator_for(0, "check"))
    if budget.posterior.lora_rank is not None:
        check_adapters(unet, conditional=conditional)


def _check_finished(settings: ImageSettings) -> None:
    """InputError where the run to share lacks a stage."""
    assert settings.share is not None
    stages = ["classifier", "judge", "reference", *["prior"] * (settings.prior is None)]
    lacking = [name for name in stages if not (settings.share / name / "results.json").exists()]
    if lacking:
        raise InputError(
            f"{settings.share} holds no finished run of an image program: {', '.join(lacking)}"
            " not complete; finish it first, or leave share out"
        )


def _target(classifier: ConvClassifier, labels: tuple[int, ...] | None) -> ImageTarget:
    if labels is None:
        return every_class_target(classifier, classifier.classes)
    return class_target(classifier, labels)


def _foreign(settings: ImageSettings, budget: Budget, data: ImageDataset) -> PipelinePrior:
    assert settings.prior is not None
    return foreign_prior(
        settings.prior,
        data.shape,
        levels=budget.prior.levels,
        unclipped=settings.unclipped,
        precision=budget.prior.precision,
    )
