"""Inverse problems whose truth is known, and how samplers of their posteriors do.

A draw of the prior and an observation of it are exact draws of both: given the observation, the
truth is one more draw of its posterior. So whatever a sampler's draws have in the mean (how well
they explain the observation, say), the truths must have, and among the draws of its posterior the
truth must have a uniform rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rtb_rl.baselines.draws import Draws
from rtb_rl.baselines.selection import ImportanceReference
from rtb_rl.baselines.weighted import weighted_paths
from rtb_rl.core import elbo
from rtb_rl.core.protocols import Condition
from rtb_rl.tasks.image.measurements import (
    OBSERVATION,
    GaussianBlur,
    Inpainting,
    Measurement,
    SuperResolution,
)
from rtb_rl.tasks.image.metrics import calibration_ranks, chi_square_p, psnr
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.task import Task

BINS = 8  # of ranks
COLUMNS = (
    "psnr",
    "psnr_mean",
    "log_likelihood",
    "excess",
    "elbo",
    "log_z",
    "ess",
    "calls",
    "training_calls",
)


def measurements(shape: tuple[int, int, int], *, sigma: float) -> dict[str, Measurement]:
    """The lower half hidden, squares of 2 x 2 pixels averaged, blurred; each with noise `sigma`."""
    _, height, width = shape
    visible = torch.zeros(height, width, dtype=torch.bool)
    visible[: height // 2] = True
    operators = {
        "inpainting": Inpainting(visible),
        "super-resolution": SuperResolution(2),
        "deblurring": GaussianBlur(),
    }
    return {name: Measurement(operator, sigma) for name, operator in operators.items()}


@dataclass(frozen=True)
class Observed:
    """Truths [n, C, H, W], draws of the prior, and an observation of each."""

    measurement: Measurement
    truth: Tensor
    condition: dict[str, Tensor]

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """log p(y | x0), nats: [n, m] of [n, m, C, H, W]."""
        each = self.condition[OBSERVATION].repeat_interleave(x0.shape[1], 0)
        return self.measurement.log_likelihood(x0.flatten(0, 1), each).reshape(x0.shape[:2])

    def statistics(self, x0: Tensor) -> dict[str, Tensor]:
        """Numbers whose ranks are tested: [n, m] of [n, m, C, H, W]."""
        generator = generator_for(0, "projection", device=x0.device)
        direction = torch.randn(x0.shape[2:], generator=generator, device=x0.device)
        height = x0.shape[-2]
        return {
            "log p(y|x)": self.log_likelihood(x0),
            "mean of the lower half": x0[..., height // 2 :, :].mean((-3, -2, -1)),
            "random projection": (x0 * direction).sum((-3, -2, -1)),
        }


def observe(measurement: Measurement, truth: Tensor, *, generator: Generator) -> Observed:
    """An observation of each truth."""
    y = measurement.observe(truth, generator=generator)
    return Observed(measurement, truth, {OBSERVATION: y})


def judge(draws: Draws, observed: Observed, *, generator: Generator) -> dict[str, float]:
    """Draws [n, m, C, H, W] of the posteriors of n observations, against their truths.

    `psnr` of the draws and `psnr_mean` of their mean, dB; `log_likelihood`, mean log p(y | x0), and
    its excess over that of the truths, in standard errors over observations; `p` of the ranks of
    each statistic. `log_z`, `ess` and `calls` where the method has them.
    """
    x0, truth = draws.x0, observed.truth
    fit = observed.log_likelihood(x0).mean(1)
    excess = fit - observed.log_likelihood(truth[:, None]).squeeze(1)
    row = {
        "psnr": float(psnr(x0.flatten(0, 1), truth.repeat_interleave(x0.shape[1], 0)).mean()),
        "psnr_mean": float(psnr(x0.mean(1), truth).mean()),
        "log_likelihood": float(fit.mean()),
        "excess": float(excess.mean() / (excess.std() / math.sqrt(len(excess)))),
        "calls": draws.calls,
    }
    for name in ("log_z", "ess"):
        if (values := getattr(draws, name)) is not None:
            row[name] = float(values.mean())
    return row | calibration(x0, observed, generator=generator)


def calibration(x0: Tensor, observed: Observed, *, generator: Generator) -> dict[str, float]:
    """Chi-square p-values of the truths' ranks among the draws, "p of STATISTIC" each."""
    count, drawn = x0.shape[1], observed.statistics(x0)
    exact = observed.statistics(observed.truth[:, None])
    return {
        f"p of {name}": chi_square_p(
            calibration_ranks(exact[name].squeeze(1), values, generator=generator),
            count,
            bins=min(BINS, count + 1),
        )
        for name, values in drawn.items()
    }


def posterior_draws(
    task: Task, condition: Condition, n: int, *, generator: Generator
) -> tuple[Draws, float]:
    """Draws of a trained posterior with the log Z and ESS of their weights, and the mean ELBO.

    `calls` is the price of the draws alone; their weights cost as many calls of the prior.
    """
    found = weighted_paths(task, condition, n, generator=generator)
    draws = Draws(found.x0, task.diffusion.levels, found.log_z, found.ess)
    return draws, float(elbo(found.log_weight).mean())


def pool_draws(
    pool: Tensor, levels: int, observed: Observed, n: int, *, generator: Generator
) -> Draws:
    """Resampled from prior draws [m, C, H, W] by p(y | x0): the posterior, as m grows.

    `calls` is the price of the pool for one observation.
    """
    observations = observed.condition[OBSERVATION].split(1)
    scores = [
        observed.measurement.log_likelihood(pool, y.expand(len(pool), *y.shape[1:]))
        for y in observations
    ]
    shared = pool.expand(len(observations), *pool.shape)
    reference = ImportanceReference(shared, torch.stack(scores).double())
    x0, source = reference.resample_with_source(n, generator=generator)
    return Draws(x0, len(pool) * levels / n, reference.log_z, reference.ess, source)


def markdown(rows: Mapping[str, Mapping[str, float]]) -> str:
    """One line a method; a dash where it has no such number. Last the smallest p of its ranks."""
    lines = ["| method | " + " | ".join([*COLUMNS, "least p"]) + " |"]
    lines.append("| --- |" + " --- |" * (len(COLUMNS) + 1))
    for name, row in rows.items():
        cells = [f"{row[key]:.4g}" if key in row else "-" for key in COLUMNS]
        least = min((value for key, value in row.items() if key.startswith("p of ")), default=None)
        cells.append("-" if least is None else f"{least:.2g}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
