"""How far a posterior is from the truth, by its own residuals."""

import torch
from torch import Generator

from rtb_rl.core import (
    Denoiser,
    conditions,
    effective_sample_size,
    elbo,
    importance_log_z,
    log_weight,
    rollout_against,
)
from rtb_rl.training.task import Task


@torch.no_grad()
def diagnose(
    task: Task,
    posterior: Denoiser,
    beta: float,
    *,
    rows: int = 64,
    samples: int = 256,
    generator: Generator,
) -> dict[str, float]:
    """ELBO, importance-weighted log Z with its standard error, effective sample size, residual std.

    Drawn from the posterior: `samples` paths for each of `rows` conditions. `elbo` <= `log_z` are
    means over these conditions, in nats; `log_z_standard_error` is that of the paths, the
    conditions taken as given. `ess` is the mean over conditions, between 1 / samples and 1.
    `residual_std` is the spread of the log-weights about their condition's mean. `kl` is the path
    KL from the prior, the mean log-ratio.
    """
    condition, _ = task.draw_conditions(rows, generator=generator)
    rows = conditions.count(condition) or 1
    each = conditions.repeat(condition, samples)
    paths, ratio = rollout_against(
        task.diffusion, posterior, task.prior, each, rows * samples, generator=generator
    )
    weight = (
        log_weight(task.log_reward(paths.x0, each), ratio, beta).reshape(rows, samples).double()
    )
    log_z, error = importance_log_z(weight)
    return {
        "elbo": float(elbo(weight).mean()),
        "log_z": float(log_z.mean()),
        "log_z_standard_error": float(error.square().sum().sqrt() / rows),
        "ess": float(effective_sample_size(weight).mean()),
        "residual_std": float(weight.var(1).mean().sqrt()),
        "kl": float(ratio.mean()),
    }
