"""What trains a text-to-image posterior: trajectory balance, or a baseline at the same settings."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from accelerate import Accelerator
from torch import Generator

from rtb_rl.adapters.lora import ATTENTION
from rtb_rl.adapters.prompts import EncodedPrompts
from rtb_rl.baselines.trained import (
    Learning,
    baseline_settings,
    make_learner,
    trained_methods,
)
from rtb_rl.core import penalty_of, rtb
from rtb_rl.tasks.text_to_image.target import PromptTarget
from rtb_rl.training.finetune import Finetuner
from rtb_rl.training.mix import Mix
from rtb_rl.training.optimisers import adamw, eight_bit_adamw
from rtb_rl.training.posterior_stage import Trainer
from rtb_rl.training.rewarded import RewardedSettings
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.settings import FinetuneSettings
from rtb_rl.training.task import Task


@dataclass(frozen=True)
class TextToImagePosteriorSettings:
    """How a text-to-image posterior is trained. The defaults are for Stable Diffusion on a GPU."""

    finetune: FinetuneSettings = field(
        default_factory=lambda: FinetuneSettings(
            updates=2000,
            beta_warmup=100,
            conditions=2,
            mix=Mix(on_policy=8, data=0),
            draw_batch=8,
            levels_per_path=8,
            chunk=2,
            learning_rate=1e-4,
            log_z_learning_rate=0.1,
            gradient_clip=1.0,
            average_decay=0.99,
        )
    )
    per_dimension: bool = False
    """The published temperature: their log-densities are means over the latent's d numbers, so
    their beta counts d times (16,384 for 512 x 512). See `nominal_beta`."""
    lora_rank: int | None = 4
    """Rank of the adapters; None: all weights of a copy of the U-Net."""
    lora_targets: tuple[str, ...] = ATTENTION
    huber_threshold: float | None = None
    """Residuals are squared, beyond so many nats linear."""
    linex_limit: float | None = None
    """Residuals have the linex penalty, linear below minus so many nats. With a Huber threshold too
    the sum of both counts; with neither, squares."""
    look_ahead: bool = False
    """Less noise in the gradient for one decoding and one reward more a step that gets one."""
    learned_start: bool = False
    """Learn the law of the first noise, for a chain that keeps signal at its last level."""
    start: RewardedSettings | None = None
    """What comes before, where paths of the prior are cheap: regression on their rewards. None: the
    posterior starts as the prior."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    eight_bit: bool = False
    """Moments of the optimiser in 8 bits, by bitsandbytes."""
    diagnostic_samples: int = 32
    """Draws for each prompt in the final diagnostics."""
    log_every: int = 10
    grid_every: int = 50
    """Updates between grids of samples in TensorBoard."""


MakeTrainer = Callable[
    [Task, PromptTarget, EncodedPrompts, TextToImagePosteriorSettings, Generator, Accelerator],
    Trainer,
]


def nominal_beta(settings: TextToImagePosteriorSettings, event_shape: Sequence[int]) -> float:
    """The beta of p r^beta that these settings train.

    With log-ratio and log Z as means over the d numbers of a latent, the residual
    log Z' + ratio / d - beta log r is 1 / d of that of beta d: the published beta of 1 is 16,384
    for Stable Diffusion at 512 x 512 (arXiv 2405.20971 appendix H and its code).
    """
    dimensions = math.prod(event_shape) if settings.per_dimension else 1
    return settings.finetune.beta * dimensions


def relative_trajectory_balance(
    task: Task,
    target: PromptTarget,
    prompts: EncodedPrompts,
    settings: TextToImagePosteriorSettings,
    generator: Generator,
    accelerator: Accelerator,
) -> Finetuner:
    """The default trainer."""
    tuned = replace(settings.finetune, beta=nominal_beta(settings, task.diffusion.event_shape))
    first = generator_for(generator.initial_seed(), "log Z")
    log_z = target.make_log_z(prompts, tuned.mix.total, first)
    penalty = penalty_of(settings.huber_threshold, settings.linex_limit)
    return Finetuner(
        task,
        log_z.to(generator.device),
        tuned,
        generator=generator,
        objective=rtb(penalty),
        look_ahead=settings.look_ahead,
        accelerator=accelerator,
        optimiser=eight_bit_adamw if settings.eight_bit else adamw,
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
        target: PromptTarget,
        prompts: EncodedPrompts,
        settings: TextToImagePosteriorSettings,
        generator: Generator,
        accelerator: Accelerator,
    ) -> Trainer:
        tuned = settings.finetune
        paths = tuned.conditions * tuned.mix.total
        rows = max(1, min(tuned.conditions, len(target.prompts), paths // 2))
        chosen = baseline_settings(
            tuned,
            task.diffusion.levels,
            beta=nominal_beta(settings, task.diffusion.event_shape),
            conditions=rows,
            paths=paths // rows,
        )
        return make_learner(self.learning, task, chosen, generator=generator)


def trained_baselines() -> dict[str, Baseline]:
    """Name -> what makes the trainer."""
    return {name: Baseline(name, learning) for name, learning in trained_methods().items()}
