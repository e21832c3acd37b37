"""How far a posterior is from the truth, by its own residuals."""

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from rtb_rl.core import (
    Denoiser,
    conditions,
    effective_sample_size,
    elbo,
    eubo,
    importance_eubo,
    importance_log_z,
    log_ratio,
    log_weight,
    noise_back,
    rollout_against,
)
from rtb_rl.core.protocols import Condition
from rtb_rl.training.scoring import score
from rtb_rl.training.task import Task

CHUNK = 16_384
CLOSE = 0.9  # effective sample size above which draws are said to do as they are


def posterior_bounds(weight: Tensor) -> dict[str, Tensor]:
    """ELBO, importance-weighted log Z, estimated EUBO and ESS of log-weights [rows, paths] of
    posterior paths, one row a condition; means over the rows.
    """
    return {
        "elbo": elbo(weight).mean(),
        "log_z_importance": importance_log_z(weight)[0].mean(),
        "eubo_estimate": importance_eubo(weight).mean(),
        "ess": effective_sample_size(weight).mean(),
    }


@torch.no_grad()
def diagnose(
    task: Task,
    posterior: Denoiser,
    beta: float,
    *,
    rows: int = 64,
    samples: int = 256,
    batch: int | None = None,
    generator: Generator,
) -> dict[str, float]:
    """Bounds of log Z and what they say: `samples` posterior paths for each of `rows` conditions,
    `batch` of them drawn at once.

    `elbo` <= `log_z` are means over these conditions, in nats; `log_z_standard_error` is that of
    the paths, the conditions taken as given. `eubo` is an upper bound of log Z from exact draws of
    the target, where the task has them (at beta 1) and its prior reverses the noising; else
    `eubo_estimate` is taken from importance weights and is no bound. `ess` is the mean effective
    sample size over conditions, between 1 / samples and 1. `residual_std` is the spread of the
    log-weights about their condition's mean. `kl` is the path KL from the prior, the mean
    log-ratio. `signal_left` is that of the diffusion. `floored` is the share of rewards that were
    minus infinity, or below LOG_REWARD_FLOOR.
    """
    condition, _ = task.draw_conditions(rows, generator=generator)
    rows = conditions.count(condition) or 1
    each = conditions.repeat(condition, samples)
    x0, ratio = _ends(task, posterior, each, rows * samples, batch, generator=generator)
    log_reward, floored = score(task, x0, each)
    weight = log_weight(log_reward, ratio, beta).reshape(rows, samples).double()
    log_z, error = importance_log_z(weight)
    return {
        "elbo": float(elbo(weight).mean()),
        "log_z": float(log_z.mean()),
        "log_z_standard_error": float(error.square().sum().sqrt() / rows),
        **_upper(task, posterior, beta, condition, weight, batch, generator=generator),
        "ess": float(effective_sample_size(weight).mean()),
        "residual_std": float(weight.var(1).mean().sqrt()),
        "kl": float(ratio.mean()),
        "signal_left": float(task.diffusion.signal_left),
        "floored": floored / (rows * samples),
    }


def _ends(
    task: Task,
    posterior: Denoiser,
    condition: Condition,
    count: int,
    batch: int | None,
    *,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Where posterior paths end, and their log-ratios."""
    parts = []
    for part, rows in conditions.split(condition, count, batch):
        paths, ratio = rollout_against(
            task.diffusion, posterior, task.prior, part, rows, generator=generator
        )
        parts.append((paths.x0, ratio))
    x0, ratios = zip(*parts, strict=True)
    return torch.cat(x0), torch.cat(ratios)


def _upper(
    task: Task,
    posterior: Denoiser,
    beta: float,
    condition: Condition,
    weight: Tensor,
    batch: int | None,
    *,
    generator: Generator,
) -> dict[str, float]:
    """The EUBO from exact target draws where there are any, else its estimate."""
    if task.draw_target is None or beta != 1:
        return {"eubo_estimate": float(importance_eubo(weight).mean())}
    rows, samples = weight.shape
    each = conditions.repeat(condition, samples)
    x0 = task.draw_target(condition, samples, generator=generator)
    x0 = x0.reshape(rows * samples, *task.diffusion.event_shape)
    ratios, pieces = [], conditions.split(each, len(x0), batch)
    for (part, _), points in zip(pieces, x0.split(batch or len(x0)), strict=True):
        paths = noise_back(task.diffusion, points, part, generator=generator)
        chunk = batch or CHUNK
        ratios.append(log_ratio(task.diffusion, posterior, task.prior, paths, chunk=chunk))
    log_reward = score(task, x0, each)[0]
    target = log_weight(log_reward, torch.cat(ratios), beta).reshape(rows, samples)
    error = target.double().std(1).square().sum().sqrt() / (rows * samples**0.5)
    return {"eubo": float(eubo(target.double()).mean()), "eubo_standard_error": float(error)}


def trust(diagnostics: Mapping[str, float]) -> str:
    """What the diagnostics say about the posterior, in words.

    The target's mean of any f is within sqrt(1 / ess - 1) standard deviations of f under the
    posterior of the posterior's own (Cauchy-Schwarz: 1 / ess - 1 is the chi-square divergence): a
    third of one at ess 0.9, a whole one at 0.5.
    """
    ess = diagnostics["ess"]
    if ess > CLOSE:
        verdict = "close to prior * r^beta; draws can be used as they are"
    elif ess > 0.5:
        verdict = "not yet prior * r^beta: draws as they are can be biased; resample by importance"
    elif ess > 0.1:
        verdict = "a rough approximation: draws as they are can be far off; resample by importance"
    else:
        verdict = "far from prior * r^beta: train longer or lower beta"
    if "eubo" in diagnostics:
        upper = f"{diagnostics['eubo']:.3f} (upper bound, from exact draws of the target)"
    else:
        upper = f"{diagnostics['eubo_estimate']:.3f} (estimated from importance weights, no bound)"
    left = diagnostics["signal_left"]
    start = f"; signal {left:.3f} left at the last level, so it can't be exact" * (left > 0.05)
    floored = diagnostics["floored"]
    impossible = f"; {floored:.1%} of the draws have reward zero" * (floored > 0)
    return (
        f"log Z between {diagnostics['elbo']:.3f} (lower bound) and {upper},"
        f" {diagnostics['log_z']:.3f} +/- {diagnostics['log_z_standard_error']:.3f} by importance"
        f" weights; effective sample size {ess:.2f}; {verdict}{start}{impossible}"
    )
