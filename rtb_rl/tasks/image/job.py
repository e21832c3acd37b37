"""What every image program begins with: data, prior, classifiers, target, reference."""

from dataclasses import asdict, replace

import torch
from accelerate import Accelerator

from rtb_rl.adapters.pipelines import PipelinePrior
from rtb_rl.nn.convolution import ConvClassifier
from rtb_rl.tasks.image.classifier import fit_classifier
from rtb_rl.tasks.image.comparison import ImageJob
from rtb_rl.tasks.image.evaluation import Judge, Reference
from rtb_rl.tasks.image.images import ImageDataset, load_images
from rtb_rl.tasks.image.prior import fit_prior, foreign_prior, prior_draws
from rtb_rl.tasks.image.settings import Budget, ImageSettings, budget_for
from rtb_rl.tasks.image.target import ImageTarget, class_target, every_class_target
from rtb_rl.training.run import Run
from rtb_rl.training.stage import device_for_training


def open_image_job(settings: ImageSettings, *, program: str) -> ImageJob:
    """Load and check all that is given, fit what is not: prior, classifiers, prior draws.

    Raises InputError for data, classes or a pipeline that don't fit, before anything is trained.
    """
    data = load_images(settings.data).to(device_for_training())
    labels = target_labels(settings.target, data)
    budget = budget_for(settings.budget, data)
    if settings.levels is not None:
        budget = replace(budget, prior=replace(budget.prior, levels=settings.levels))
    finetune = replace(budget.posterior.finetune, beta=settings.beta)
    budget = replace(budget, posterior=replace(budget.posterior, finetune=finetune))
    given = {name: value for name, value in asdict(settings).items() if name != "out"}
    facts = {"data_sha256": data.sha256, "settings": asdict(budget), "program": program}
    if settings.prior is not None:
        _foreign(settings, budget, data)
    run = Run(settings.out, {**given, **facts})
    root = settings.share or run.directory
    with Accelerator().main_process_first():
        if settings.prior is None:
            prior = fit_prior(root / "prior", data, budget.prior, seed=settings.seed)
        else:
            prior = _foreign(settings, budget, data)
        classifier = fit_classifier(
            root / "classifier", data, budget.classifier, seed=settings.seed
        )
        judge = fit_classifier(root / "judge", data, budget.judge, seed=settings.seed + 1)
        draws = prior_draws(root / "reference", prior, budget.reference_draws, seed=settings.seed)
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
    if target in named:
        return named[target]
    words = [word.strip() for word in target.split(",")]
    return tuple(data.label(int(word) if word.isdigit() else word) for word in words)


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
