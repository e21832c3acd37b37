"""What every image program begins with: data, prior, classifiers, target, reference."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from rtb_rl.adapters.pipelines import PipelinePrior
from rtb_rl.baselines.draws import Draws
from rtb_rl.core import conditions
from rtb_rl.core.protocols import Condition
from rtb_rl.nn.convolution import ConvClassifier
from rtb_rl.tasks.image.budget import Budget, BudgetName, budget_for
from rtb_rl.tasks.image.classifier import fit_classifier
from rtb_rl.tasks.image.evaluation import Judge, Reference, average_rows, compare
from rtb_rl.tasks.image.images import ImageDataset, load_images, to_images
from rtb_rl.tasks.image.prior import fit_prior, foreign_prior, prior_draws
from rtb_rl.tasks.image.report import SIDE, draw_figure, markdown, print_table
from rtb_rl.tasks.image.target import ImageTarget, class_target, every_class_target
from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import device_for_training


@dataclass(frozen=True)
class ImageSettings:
    """What all image programs ask for."""

    data: str = "digits"
    """"digits" (scikit-learn's, 8x8), a folder or file of idx, npz or pictures, or hf:NAME."""
    target: str = "even"
    """Classes, such as "3" or "1,7"; even; odd; or each: one posterior for every class."""
    out: Path = Path("runs/image")
    """Directory of the run; the same command continues what it finds there."""
    seed: int = 0
    budget: BudgetName = "full"
    prior: str | None = None
    """A diffusers DDPM pipeline, folder or hub id, instead of a prior trained on the data."""
    levels: int | None = None
    """Denoising steps; not given: those of the budget."""
    unclipped: bool = False
    """Sample a pipeline given as --prior without the clipping that its scheduler asks for."""
    share: Path | None = None
    """Run whose prior, classifiers and reference are used instead of fitting them here."""
    beta: float = 1.0
    """Strength of the reward."""


@dataclass(frozen=True)
class ImageJob:
    """An open run with all that is fitted before the posterior."""

    settings: ImageSettings
    budget: Budget
    run: Run
    data: ImageDataset
    prior: PipelinePrior
    labels: tuple[int, ...] | None
    """The classes that are asked for together; None: each alone."""
    classifier: ConvClassifier
    target: ImageTarget
    judge: Judge
    references: Sequence[Reference]
    """One for each condition that is evaluated; one alone where there is none."""

    @property
    def condition(self) -> Condition:
        """The conditions of the references, a row each."""
        return conditions.concatenate([one.condition for one in self.references])

    def compare(
        self, draws: Draws, seconds: float, training: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """One row of the table: a method's draws for every reference's condition.

        `training`: the results of a posterior's run; its diagnostics stand in for log Z and ESS.
        """
        x0 = draws.x0 if self.condition is not None else draws.x0.unsqueeze(0)
        generator = generator_for(self.settings.seed, "compare", device=x0.device)
        rows = [
            compare(points, reference, self.judge, generator=generator)
            for points, reference in zip(x0, self.references, strict=True)
        ]
        log_z = torch.stack([one.draws.log_z for one in self.references])
        errors = torch.stack([one.draws.standard_error for one in self.references])
        return {
            **average_rows(rows),
            "reference_log_z": float(log_z.mean()),
            "reference_log_z_error": float(errors.square().sum().sqrt() / len(errors)),
            "reference_ess": float(torch.stack([one.draws.ess for one in self.references]).mean()),
            "log_z": None if draws.log_z is None else float(draws.log_z.mean()),
            "ess": None if draws.ess is None else float(draws.ess.mean()),
            **_of_training(training),
            "calls": draws.calls,
            "seconds": seconds / (x0.shape[0] * x0.shape[1]),
            "draws": x0.shape[0] * x0.shape[1],
        }

    @property
    def draws_each(self) -> int:
        """Draws of a method for each condition."""
        return max(2, self.budget.draws // len(self.references))

    def finish(self, rows: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Tensor]) -> None:
        """Print the table, draw the figure, write table.md and results.json."""
        generator = generator_for(self.settings.seed, "figure", device=self.data.images.device)
        first = self.references[0]
        reference = first.draws.resample(SIDE**2, generator=generator)[0]
        held = {"prior": first.draws.x0[0], "reference": reference, **samples}
        histograms = {name: self._histogram(x0) for name, x0 in held.items()}
        histograms["reference"] = first.mean(first.judgement.probabilities)[0]
        title = f"{self.data.name}, {self.target.name}, beta {self.settings.beta}"
        print_table(title, rows)
        figure = draw_figure(
            self.run.directory / "figure.png",
            {name: to_images(x0) for name, x0 in held.items()},
            histograms,
            self.data.classes,
        )
        self.run.log_figure(0, "evaluation", figure)
        replace_file(self.run.directory / "table.md", markdown(rows).encode())
        self.run.finish({"methods": rows, "target": self.target.name})
        Console().print(
            f"results: {self.run.directory / 'results.json'}, figure:"
            f" {self.run.directory / 'figure.png'}\ncurves: tensorboard --logdir"
            f" {self.run.directory}",
            highlight=False,
            soft_wrap=True,
        )

    def _histogram(self, x0: Tensor) -> Tensor:
        classifier = self.judge.classifier
        with torch.no_grad():
            logits = torch.cat([classifier(to_images(part)) for part in x0.split(1000)])
        return logits.double().softmax(-1).mean(0).cpu()


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


def _of_training(results: Mapping[str, Any] | None) -> dict[str, Any]:
    if results is None:
        return {"training_calls": 0, "training_seconds": 0.0}
    diagnostics = results["diagnostics"]
    return {
        "log_z": diagnostics["log_z"],
        "log_z_error": diagnostics["log_z_standard_error"],
        "ess": diagnostics["ess"],
        "training_calls": results["network_calls"],
        "training_seconds": results["seconds"],
    }


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
