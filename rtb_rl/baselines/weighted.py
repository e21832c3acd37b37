"""Draws of a trained posterior with their weights, and by their weights."""

import torch
from torch import Generator

from rtb_rl.baselines.draws import Draws
from rtb_rl.baselines.selection import ImportanceReference
from rtb_rl.core import conditions, log_weight, rollout_against, steps_of_prior
from rtb_rl.core.protocols import Condition
from rtb_rl.training.scoring import score
from rtb_rl.training.task import Task

PATHS_PER_DRAW = 4
"""Of which one is kept. The draws repeat where fewer than a quarter of the paths are effective."""


@torch.no_grad()
def weighted_paths(
    task: Task,
    condition: Condition,
    n: int,
    *,
    beta: float = 1.0,
    batch: int | None = None,
    generator: Generator,
) -> ImportanceReference:
    """`n` draws of `task.posterior` for each row of the condition, `batch` made together (None:
    all), each with log p_prior(path) r(x_0)^beta / p_post(path): prior * r^beta / Z of the chain.
    """
    rows = conditions.count(condition) or 1
    each = conditions.repeat(condition, n)
    parts = []
    for part, count in conditions.split(each, rows * n, batch):
        paths, ratio = rollout_against(
            task.diffusion, task.posterior, task.prior, part, count, generator=generator
        )
        weight = log_weight(score(task, paths.x0, part)[0], ratio, beta)
        parts.append((paths.x0, weight.double()))
    x0, weight = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return ImportanceReference(x0.reshape(rows, n, *x0.shape[1:]), weight.reshape(rows, n))


def posterior_by_weight(
    task: Task,
    condition: Condition,
    n: int,
    *,
    paths: int | None = None,
    beta: float = 1.0,
    batch: int | None = None,
    generator: Generator,
) -> Draws:
    """`n` of `paths` draws of the posterior (None: four times as many), kept by their weights: as
    `paths` grows the exact posterior, whatever the training left. 2 K paths / n calls a draw; steps
    that are the prior's need one where others need two.
    """
    paths = PATHS_PER_DRAW * n if paths is None else paths
    given = {"beta": beta, "batch": batch, "generator": generator}
    weighted = weighted_paths(task, condition, paths, **given)
    x0, source = weighted.resample_with_source(n, generator=generator)
    x0, source = (x0[0], source[0]) if condition is None else (x0, source)
    calls = (2 * task.diffusion.levels - steps_of_prior(task.posterior)) * paths / n
    return Draws(x0, calls, weighted.log_z, weighted.ess, source)
