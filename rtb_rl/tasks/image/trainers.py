"""What trains an image posterior: trajectory balance, or a baseline at the same settings."""

from collections.abc import Callable
from dataclasses import dataclass, field

from accelerate import Accelerator
from torch import Generator

from rtb_rl.baselines.trained import (
    Learning,
    baseline_settings,
    make_learner,
    trained_methods,
)
from rtb_rl.core import penalty_of, rtb
from rtb_rl.tasks.image.target import ImageTarget
from rtb_rl.training.finetune import Finetuner
from rtb_rl.training.mix import Mix
from rtb_rl.training.posterior_stage import Trainer
from rtb_rl.training.rewarded import RewardedSettings
from rtb_rl.training.settings import FinetuneSettings
from rtb_rl.training.task import Task

PATHS = 8
"""Paths of a condition that a policy gradient compares."""


@dataclass(frozen=True)
class PosteriorSettings:
    """How an image posterior is trained."""

    finetune: FinetuneSettings = field(
        default_factory=lambda: FinetuneSettings(
            updates=200,
            beta_warmup=1,
            conditions=128,
            mix=Mix(on_policy=1, data=0),
            levels_per_path=10,
            chunk=256,
            learning_rate=8e-5,
            last_learning_rate=0.03,
            log_z_learning_rate=0.1,
            average_decay=0.97,
        )
    )
    start: RewardedSettings | None = field(
        default_factory=lambda: RewardedSettings(draws=6000, steps=1500)
    )
    """What comes before: the posterior learns from rewarded draws. None: it starts as the prior."""
    huber_threshold: float | None = 20.0
    """Residuals are squared, beyond so many nats linear."""
    linex_limit: float | None = 4.0
    """Residuals have the linex penalty, linear below minus so many nats. With a Huber threshold too
    the sum of both counts; with neither, squares."""
    lora_rank: int | None = None
    """Rank of adapters on the attention of the prior's own network; None: all weights of a copy."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    diagnostic_rows: int = 10
    """Conditions of the final diagnostics, for a target that has them."""
    diagnostic_samples: int = 500
    """Draws for each; all of them for a target without conditions. By few the effective sample size
    is too large: rare paths of great weight are missing."""
    log_every: int = 10
    grid_every: int = 50
    """Updates between grids of samples in TensorBoard."""


MakeTrainer = Callable[[Task, ImageTarget, PosteriorSettings, Generator, Accelerator], Trainer]


def relative_trajectory_balance(
    task: Task,
    target: ImageTarget,
    settings: PosteriorSettings,
    generator: Generator,
    accelerator: Accelerator,
) -> Finetuner:
    """The default trainer."""
    return Finetuner(
        task,
        target.log_z(settings.finetune.mix.total).to(generator.device),
        settings.finetune,
        generator=generator,
        objective=rtb(penalty_of(settings.huber_threshold, settings.linex_limit)),
        look_ahead=True,
        accelerator=accelerator,
    )


@dataclass(frozen=True)
class Baseline:
    """Makes a trainer with the settings of trajectory balance, as far as they apply."""

    name: str
    learning: Learning

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(
        self,
        task: Task,
        target: ImageTarget,
        settings: PosteriorSettings,
        generator: Generator,
        accelerator: Accelerator,
    ) -> Trainer:
        tuned = settings.finetune
        paths = PATHS if target.is_conditional else tuned.conditions
        chosen = baseline_settings(
            tuned,
            task.diffusion.levels,
            beta=tuned.beta,
            conditions=max(1, tuned.conditions // paths),
            paths=paths,
        )
        return make_learner(self.learning, task, chosen, generator=generator)


def trained_baselines() -> dict[str, Baseline]:
    """Name -> what makes the trainer."""
    return {name: Baseline(name, learning) for name, learning in trained_methods().items()}
