"""The trained baselines by name: each makes what trains a posterior on a task."""

from collections.abc import Callable, Mapping

from torch import Generator

from rtb_rl.baselines.adjoint import AdjointMatching
from rtb_rl.baselines.policy_gradient import PolicyGradient
from rtb_rl.baselines.surrogates import ClippedDdpo, Ddpo, Dpok, Surrogate, published_dpok
from rtb_rl.baselines.trainer import BaselineSettings
from rtb_rl.core import GaussianDiffusion
from rtb_rl.errors import InputError
from rtb_rl.training.settings import FinetuneSettings
from rtb_rl.training.task import Task

Learning = Callable[[GaussianDiffusion], Surrogate] | None
"""Makes the surrogate of a policy gradient; None: adjoint matching."""


def trained_methods() -> Mapping[str, Learning]:
    """Name in a table -> how it learns."""
    return {
        "DDPO": lambda diffusion: Ddpo(),
        "DDPO, clipped": lambda diffusion: ClippedDdpo(),
        "DPOK, KL weight 1/beta": lambda diffusion: Dpok(),
        "DPOK, published weights": published_dpok,
        "adjoint matching": None,
    }


def baseline_settings(
    finetune: FinetuneSettings, levels: int, *, beta: float, conditions: int, paths: int
) -> BaselineSettings:
    """Settings of a baseline that are a posterior's; `levels` are those of the diffusion."""
    learned = finetune.levels_per_path
    return BaselineSettings(
        updates=finetune.updates,
        beta=beta,
        conditions=conditions,
        paths=paths,
        draw_batch=finetune.draw_batch,
        levels_per_path=learned and min(learned, levels),
        chunk=finetune.chunk,
        learning_rate=finetune.learning_rate,
        last_learning_rate=finetune.last_learning_rate,
        gradient_clip=finetune.gradient_clip,
        average_decay=finetune.average_decay,
        log_reward_floor=finetune.log_reward_floor,
    )


def make_learner(
    learning: Learning, task: Task, settings: BaselineSettings, *, generator: Generator
) -> PolicyGradient | AdjointMatching:
    """A trainer of `task.posterior`. InputError for a diffusion that the method has no form for."""
    if learning is None:
        return AdjointMatching(task, settings, generator=generator)
    if not isinstance(task.diffusion, GaussianDiffusion):
        raise InputError(
            f"this baseline needs a GaussianDiffusion, not {type(task.diffusion).__name__}; leave"
            " out the learned start"
        )
    surrogate = learning(task.diffusion)
    return PolicyGradient(task, settings, surrogate=surrogate, generator=generator)
