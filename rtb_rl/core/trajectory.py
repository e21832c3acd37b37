"""Denoising paths: drawing them, making them from data, and scoring one model against another on
them.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rtb_rl.core import conditions
from rtb_rl.core.last_steps import shared_steps
from rtb_rl.core.protocols import Condition, Denoiser, Diffusion


@dataclass(frozen=True)
class Trajectory:
    """x[0..K] as [K + 1, batch, *event] and what it was conditioned on.

    No probabilities: those belong to a model, not to a path. Carries no graph.
    """

    x: Tensor
    condition: Condition = None

    @property
    def levels(self) -> int:
        return self.x.shape[0] - 1

    @property
    def x0(self) -> Tensor:
        return self.x[0]


@torch.no_grad()
def rollout(
    diffusion: Diffusion,
    denoiser: Denoiser,
    condition: Condition,
    batch: int,
    *,
    generator: Generator,
) -> Trajectory:
    """`batch` paths drawn from the denoiser's chain, from x[K] down to x[0].

    ValueError for a condition of another number of rows.
    """
    conditions.check_rows(condition, batch)
    x = diffusion.start(batch, generator=generator)
    path = [x]
    for k in range(diffusion.levels, 0, -1):
        level = _constant_level(k, x)
        x = diffusion.kernel(denoiser(x, level, condition), x, level).sample(generator=generator)
        path.append(x)
    return Trajectory(torch.stack(path[::-1]), condition)


def rollout_against(
    diffusion: Diffusion,
    denoiser: Denoiser,
    other: Denoiser,
    condition: Condition,
    batch: int,
    *,
    widening: float = 1.0,
    generator: Generator,
) -> tuple[Trajectory, Tensor]:
    """Paths drawn from `denoiser`, and log p_denoiser - log p_other on each: [batch], nats.

    The same draws as `rollout` for the same generator; the log-ratio comes in the same pass. With
    `widening` the paths are drawn from kernels so much wider, which explores; the log-ratio is that
    of the denoisers all the same.
    """
    trajectory, so_far = rollout_step_by_step(
        diffusion, denoiser, other, condition, batch, widening=widening, generator=generator
    )
    return trajectory, so_far[0]


@torch.no_grad()
def rollout_step_by_step(
    diffusion: Diffusion,
    denoiser: Denoiser,
    other: Denoiser,
    condition: Condition,
    batch: int,
    *,
    widening: float = 1.0,
    generator: Generator,
) -> tuple[Trajectory, Tensor]:
    """`rollout_against` with the log-ratio from x[K] down to each x[k]: [K + 1, batch].

    Row K is zero, row 0 the log-ratio of whole paths.
    """
    conditions.check_rows(condition, batch)
    x = diffusion.start(batch, generator=generator)
    path, so_far, shared = [x], [], shared_steps(denoiser, other)
    for k in range(diffusion.levels, 0, -1):
        level = _constant_level(k, x)
        kernel = reference = diffusion.kernel(denoiser(x, level, condition), x, level)
        if k > shared:
            reference = diffusion.kernel(other(x, level, condition), x, level)
        x = (kernel if widening == 1 else kernel.widened(widening)).sample(generator=generator)
        step = kernel.log_ratio(reference, x)
        so_far.append(so_far[-1] + step if so_far else step)
        path.append(x)
    so_far = [torch.zeros_like(so_far[0]), *so_far]
    return Trajectory(torch.stack(path[::-1]), condition), torch.stack(so_far[::-1])


@torch.no_grad()
def noise_back(
    diffusion: Diffusion, x0: Tensor, condition: Condition, *, generator: Generator
) -> Trajectory:
    """A path that ends in the given x[0] (data, replayed samples), made by noising it level by
    level.
    """
    return Trajectory(diffusion.noise_path(x0, generator=generator), condition)


def log_ratio(
    diffusion: Diffusion,
    posterior: Denoiser,
    prior: Denoiser,
    trajectory: Trajectory,
    *,
    levels: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """sum_k log p_post(x[k-1] | x[k]) - log p_prior(x[k-1] | x[k]), nats: [batch].

    `levels`: int64 [count, batch], the steps to sum over for each path (default: all of them).
    `chunk`: rows (one path at one level) evaluated together; any value gives the same result.
    """
    levels = _every_level(trajectory) if levels is None else levels
    batch = levels.shape[1]
    parts = []
    for x_before, x, level, condition, _ in steps_in_chunks(trajectory, levels, chunk):
        kernel = diffusion.kernel(posterior(x, level, condition), x, level)
        with torch.no_grad():
            reference = diffusion.kernel(prior(x, level, condition), x, level)
        parts.append(kernel.log_ratio(reference, x_before))
    return torch.cat(parts).reshape(-1, batch).sum(0)


def steps_in_chunks(trajectory: Trajectory, levels: Tensor, chunk: int | None):
    """The chosen steps as batches `(x[k-1], x[k], k, condition, path index)` of at most `chunk`
    rows.
    """
    batch = levels.shape[1]
    flat = levels.flatten()
    paths = torch.arange(batch, device=flat.device).repeat(levels.shape[0])
    size = len(flat) if chunk is None else chunk
    for begin in range(0, len(flat), size):
        level, path = flat[begin : begin + size], paths[begin : begin + size]
        yield (
            trajectory.x[level - 1, path],
            trajectory.x[level, path],
            level,
            conditions.take(trajectory.condition, path),
            path,
        )


def _every_level(trajectory: Trajectory) -> Tensor:
    levels = torch.arange(1, trajectory.levels + 1, device=trajectory.x.device)
    return levels[:, None].expand(-1, trajectory.x.shape[1])


def _constant_level(level: int, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), level, dtype=torch.int64, device=x.device)
