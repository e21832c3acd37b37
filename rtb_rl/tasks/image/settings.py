"""What image programs ask for, and how much work every stage does."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rtb_rl.tasks.image.classifier import ClassifierSettings
from rtb_rl.tasks.image.images import ImageDataset
from rtb_rl.tasks.image.prior import PriorSettings
from rtb_rl.tasks.image.trainers import PosteriorSettings
from rtb_rl.training.pretrain import PretrainSettings
from rtb_rl.training.rewarded import RewardedSettings

BudgetName = Literal["smoke", "demo", "full"]


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
    """Of the posterior and its draws."""
    prior_seed: int = 0
    """Of prior, classifiers and reference."""
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
    draws: int | None = None
    """Of each method, for the comparison; not given: those of the budget."""


@dataclass(frozen=True)
class Budget:
    """Settings of every stage."""

    prior: PriorSettings = field(default_factory=PriorSettings)
    classifier: ClassifierSettings = field(default_factory=lambda: ClassifierSettings(width=16))
    judge: ClassifierSettings = field(default_factory=lambda: ClassifierSettings(width=24))
    posterior: PosteriorSettings = field(default_factory=PosteriorSettings)
    reference_draws: int = 5000
    draws: int = 2000
    """Of each method, in the evaluation."""


def budget_for(name: BudgetName, data: ImageDataset) -> Budget:
    """`smoke`: every stage in seconds; `demo`: minutes; `full`: what the tables are made with."""
    small, colour = data.shape[1] <= 16, data.shape[0] == 3
    full = Budget() if small else _colour() if colour else _larger()
    return {"smoke": _smoke, "demo": _demo, "full": lambda budget: budget}[name](full)


def _larger() -> Budget:
    """For images of 28 x 28 or 32 x 32 on two cores."""
    return Budget(
        prior=PriorSettings(
            widths=(16, 32, 32),
            attention=False,
            levels=20,
            pretrain=PretrainSettings(steps=4000, batch=64),
        ),
        classifier=ClassifierSettings(steps=1500, width=16),
        judge=ClassifierSettings(steps=1500, width=24),
        posterior=replace(
            _with(PosteriorSettings(), updates=40, conditions=64, learning_rate=5e-5),
            start=RewardedSettings(draws=6000, steps=2000, batch=96),
        ),
        reference_draws=5000,
        draws=1000,
    )


def _colour() -> Budget:
    """For colour images of 32 x 32, such as CIFAR-10, on a GPU; far too much for two cores."""
    return Budget(
        prior=PriorSettings(
            widths=(64, 128, 128),
            levels=30,
            pretrain=PretrainSettings(steps=4000, batch=128, learning_rate=4e-4),
            half_precision=True,
        ),
        classifier=ClassifierSettings(steps=2000, width=48),
        judge=ClassifierSettings(steps=2000, width=64),
        posterior=replace(
            _with(PosteriorSettings(), updates=30, conditions=64, chunk=512, learning_rate=5e-5),
            start=RewardedSettings(draws=6000, steps=2000),
        ),
        reference_draws=5000,
        draws=1000,
    )


def _demo(budget: Budget) -> Budget:
    return replace(
        budget,
        prior=replace(budget.prior, pretrain=replace(budget.prior.pretrain, steps=1500)),
        posterior=replace(
            _with(budget.posterior, updates=30),
            start=RewardedSettings(draws=3000, steps=500),
        ),
        reference_draws=2000,
        draws=500,
    )


def _smoke(budget: Budget) -> Budget:
    tiny = replace(budget.classifier, steps=20, width=8)
    prior = PretrainSettings(steps=10, batch=16)
    posterior = _with(budget.posterior, updates=4, conditions=8, beta_warmup=1)
    return replace(
        budget,
        prior=replace(budget.prior, widths=(8, 16), attention=True, levels=6, pretrain=prior),
        classifier=tiny,
        judge=tiny,
        posterior=replace(
            posterior,
            start=RewardedSettings(draws=40, steps=10, batch=16),
            diagnostic_rows=2,
            diagnostic_samples=8,
            log_every=2,
            grid_every=2,
        ),
        reference_draws=40,
        draws=20,
    )


def _with(settings: PosteriorSettings, **changes: Any) -> PosteriorSettings:
    return replace(settings, finetune=replace(settings.finetune, **changes))
