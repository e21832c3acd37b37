"""What trains a posterior of gaps: trajectory balance, and what it is compared with."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Generator, Tensor

from rtb_rl.baselines import DenoisingPosterior, DenoisingSettings, ImportanceReference
from rtb_rl.core import conditions
from rtb_rl.tasks.language.log_z import NoisyContextValue, group_log_z
from rtb_rl.tasks.language.prompts import Frame, Prompts
from rtb_rl.training.finetune import Finetuner
from rtb_rl.training.mix import LearnedLogZ, Mix
from rtb_rl.training.posterior_stage import Trainer
from rtb_rl.training.pretrain import Pretrainer, PretrainSettings
from rtb_rl.training.settings import FinetuneSettings
from rtb_rl.training.task import Task

LORA_TARGETS = ("query_key_value", "attended")
DENOISING = DenoisingSettings(
    updates=800,
    conditions=64,
    paths=4,
    data=0,
    refresh=20,
    learning_rate=5e-4,
    last_learning_rate=0.05,
    average_decay=0.98,
    replay_capacity=100_000,
)
START = replace(DENOISING, updates=300, refresh=100)


@dataclass(frozen=True)
class TextPosteriorSettings:
    """How the posterior is trained."""

    finetune: FinetuneSettings = field(
        default_factory=lambda: FinetuneSettings(
            updates=150,
            beta_warmup=1,
            conditions=16,
            mix=Mix(on_policy=8, data=0),
            levels_per_path=None,
            chunk=512,
            learning_rate=5e-4,
            last_learning_rate=0.05,
            average_decay=0.98,
        )
    )
    supervised: PretrainSettings = field(
        default_factory=lambda: PretrainSettings(
            steps=500, batch=64, learning_rate=3e-4, average_decay=0.98
        )
    )
    """Of supervised fine-tuning, a baseline."""
    start: DenoisingSettings | None = START
    """Of the short training by DDPP-LB from which trajectory balance starts; None: the prior."""
    denoising: DenoisingSettings = DENOISING
    """Of DDPP-LB alone, a baseline."""
    lora_rank: int | None = None
    """Adapters of this rank instead of a copy of all weights."""
    lora_targets: tuple[str, ...] = LORA_TARGETS
    """Names of the layers that get adapters."""
    log_every: int = 10
    text_every: int = 50
    """Updates between infills logged as text."""


MakeTrainer = Callable[[Task, Prompts, TextPosteriorSettings, Generator], tuple[Trainer, int]]
"""(task, prompts, settings, generator) -> a trainer and its number of updates."""


class MakeLogZ(Protocol):
    """An estimate of log Z for fine-tuning."""

    def __call__(
        self, frame: Frame, settings: FinetuneSettings, *, generator: Generator
    ) -> LearnedLogZ: ...


def relative_trajectory_balance(make_log_z: MakeLogZ = group_log_z) -> MakeTrainer:
    """RTB with log Z of each gap by groups of paths, or as `make_log_z` says."""

    def trainer(
        task: Task, prompts: Prompts, settings: TextPosteriorSettings, generator: Generator
    ) -> tuple[Trainer, int]:
        log_z = make_log_z(prompts.frame, settings.finetune, generator=generator)
        finetuner = Finetuner(task, log_z, settings.finetune, generator=generator)
        return finetuner, settings.finetune.updates

    return trainer


def supervised(
    task: Task, prompts: Prompts, settings: TextPosteriorSettings, generator: Generator
) -> tuple[Trainer, int]:
    """Maximum likelihood of what people wrote there, both contexts in view: an upper bound."""

    def draw(n: int, *, generator: Generator) -> tuple[Tensor, Any]:
        return prompts.examples(n, generator=generator)

    chosen = settings.supervised
    trainer = Pretrainer(task.diffusion, task.posterior, draw, chosen, generator=generator)
    return trainer, chosen.steps


def denoising_posterior(
    chosen: DenoisingSettings, pool: ImportanceReference | None = None
) -> MakeTrainer:
    """DDPP-LB (arXiv 2410.08134).

    `pool`: prior draws of every gap [gaps, n, slots] with beta log r, which its memory begins with.
    """

    def trainer(
        task: Task, prompts: Prompts, settings: TextPosteriorSettings, generator: Generator
    ) -> tuple[Trainer, int]:
        log_z = NoisyContextValue(prompts.frame, generator=generator)
        made = DenoisingPosterior(task, log_z, chosen, generator=generator)
        if pool is not None:
            log_reward = (pool.log_weight / chosen.beta).float().flatten()
            each = conditions.repeat(prompts.condition, pool.x0.shape[1])
            made.replay.add(pool.x0.flatten(0, 1), each, log_reward)
        return made, chosen.updates

    return trainer
