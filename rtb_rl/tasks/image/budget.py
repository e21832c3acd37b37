"""How much work every stage of an image program does."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rtb_rl.tasks.image.classifier import ClassifierSettings
from rtb_rl.tasks.image.images import ImageDataset
from rtb_rl.tasks.image.posterior import PosteriorSettings
from rtb_rl.tasks.image.prior import PriorSettings
from rtb_rl.training.pretrain import PretrainSettings

BudgetName = Literal["smoke", "demo", "full"]


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
    small = data.shape[1] <= 16
    full = Budget() if small else _larger()
    return {"smoke": _smoke, "demo": _demo, "full": lambda budget: budget}[name](full)


def _larger() -> Budget:
    """For images of 28 x 28 or 32 x 32 on two cores."""
    return Budget(
        prior=PriorSettings(
            widths=(16, 32, 32),
            attention=False,
            levels=20,
            pretrain=PretrainSettings(steps=4000, batch=64),
            half_precision=True,
        ),
        classifier=ClassifierSettings(steps=1500, width=16),
        judge=ClassifierSettings(steps=1500, width=24),
        posterior=_with(PosteriorSettings(), updates=150, conditions=32, levels_per_path=5),
        reference_draws=5000,
        draws=1000,
    )


def _demo(budget: Budget) -> Budget:
    return replace(
        budget,
        prior=replace(budget.prior, pretrain=replace(budget.prior.pretrain, steps=1500)),
        posterior=_with(budget.posterior, updates=100),
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
            posterior, diagnostic_rows=2, diagnostic_samples=8, log_every=2, grid_every=2
        ),
        reference_draws=40,
        draws=20,
    )


def _with(settings: PosteriorSettings, **changes: Any) -> PosteriorSettings:
    return replace(settings, finetune=replace(settings.finetune, **changes))
