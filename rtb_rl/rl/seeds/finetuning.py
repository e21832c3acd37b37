"""The RTB loop for several seeds at once: `Finetuner` on stacked networks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    ConditionalLogZ,
    GroupMeanLogZ,
    backward_in_chunks,
    log_weight,
    random_levels,
    residual,
)
from rtb_rl.core.protocols import Objective
from rtb_rl.errors import InputError, NonFiniteError
from rtb_rl.nn.stacked import blocks
from rtb_rl.rl.seeds.runs import Generators
from rtb_rl.rl.seeds.task import StackedLogZ
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.diagnostics import posterior_bounds
from rtb_rl.training.finetune import Finetuner
from rtb_rl.training.mix import LearnedLogZ
from rtb_rl.training.paths import Part, merge
from rtb_rl.training.settings import FinetuneSettings
from rtb_rl.training.task import Task


class SeedFinetuner:
    """Trains the stacked `task.posterior`; each seed has its loss, its clipping and its draws.

    `settings` are those of one seed. Rows are evaluated level by level, so that memory grows with
    the seeds and not with `settings.chunk`. Raises InputError for a mix with replay or paths drawn
    in batches.
    """

    def __init__(
        self,
        task: Task,
        log_zs: Sequence[LearnedLogZ],
        settings: FinetuneSettings,
        objective: Objective,
        *,
        generators: Generators,
    ):
        check_settings(settings)
        self.settings, self.objective, self.generators = settings, objective, generators
        rows = settings.conditions * len(generators)
        self.inner = Finetuner(
            task,
            _one_log_z(log_zs),
            replace(settings, conditions=rows, chunk=rows),
            generator=cast(Generator, generators),
        )

    def update(self, step: int) -> Mapping[str, Tensor]:
        """One gradient step of every seed on fresh paths; what the residuals said."""
        inner, settings = self.inner, self.settings
        beta = settings.beta * min(1.0, (step + 1) / max(settings.beta_warmup, 1))
        decay = 1 - (1 - settings.last_learning_rate) * step / settings.updates
        inner.optimiser.param_groups[0]["lr"] = settings.learning_rate * decay
        parts = inner.paths.draw()
        drawn = merge(parts, inner.settings.conditions)
        paths, ratio, log_reward = drawn.path, drawn.log_ratio, drawn.log_reward
        self._check_finite(step, log_ratio=ratio)
        ratio.requires_grad_()
        weight = log_weight(log_reward, ratio.detach(), beta)
        if step == 0:
            inner.log_z.start_at(weight)
        log_z = inner.log_z(paths.condition, weight)
        terms = zip(*map(self._each, (log_z, ratio, log_reward)), strict=True)
        loss = torch.stack([self.objective(z, own, reward, beta) for z, own, reward in terms])
        log_z = log_z.detach().clone()
        inner.optimiser.zero_grad(set_to_none=True)
        loss.sum().backward()
        assert ratio.grad is not None
        backward_in_chunks(
            inner.task.diffusion,
            inner.task.posterior,
            paths,
            ratio.grad,
            levels=self._levels(len(ratio)),
            chunk=len(ratio),
        )
        norm = clip_each(inner.trained, settings.gradient_clip)
        self._check_finite(step, loss=loss.detach(), gradient=norm)
        inner.optimiser.step()
        inner.average.update(inner.task.posterior)
        each = self._each
        return {
            "rtb/residual_std": each(residual(log_z, weight)).std(1),
            "rtb/loss": loss.detach(),
            "rtb/log_z": each(log_z).mean(1),
            "rtb/log_ratio": each(ratio.detach()).mean(1),
            "rtb/log_reward": each(log_reward).mean(1),
            "rtb/beta": torch.full_like(norm, beta),
            "rtb/gradient_norm": norm,
            "rtb/floored": each((log_reward == settings.log_reward_floor).float()).sum(1),
            **self._bounds(parts[0], beta),
        }

    def _each(self, values: Tensor) -> Tensor:
        """[seeds * rows] -> [seeds, rows]."""
        return blocks(values, len(self.generators))

    def _bounds(self, part: Part, beta: float) -> Mapping[str, Tensor]:
        """Bounds of log Z from the on-policy paths of this update."""
        if self.settings.mix.on_policy < 2:
            return {}
        weights = self._each(log_weight(part.log_reward, part.log_ratio, beta))
        rows = [posterior_bounds(own.reshape(self.settings.conditions, -1)) for own in weights]
        return {f"rtb/{name}": torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _levels(self, batch: int) -> Tensor | None:
        levels, count = self.inner.task.diffusion.levels, self.settings.levels_per_path
        if count is None or count >= levels:
            return None
        rows = batch // len(self.generators)
        return self.generators.cat(
            lambda own: random_levels(levels, count, rows, generator=own), dim=1
        )

    def _check_finite(self, step: int, **terms: Tensor) -> None:
        for name, values in terms.items():
            bad = ~self._each(values).isfinite().all(1)
            if bool(bad.any()):
                first = int(bad.nonzero()[0])
                raise NonFiniteError(f"{name} of seed number {first} isn't finite at step {step}")

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold, stacked."""
        return {**self.inner.parts, "generator": self.generators}


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradient of each seed to a norm of at most `limit`; the norms before, [seeds].

    As `torch.nn.utils.clip_grad_norm_` does it for the parameters of one seed.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.reshape(-1, *(1,) * (gradient.ndim - 1)))
    return norm


def _one_log_z(log_zs: Sequence[LearnedLogZ]) -> LearnedLogZ:
    if isinstance(log_zs[0], GroupMeanLogZ):
        return log_zs[0]
    return cast(LearnedLogZ, StackedLogZ(cast(list[ConditionalLogZ], log_zs)))


def check_settings(settings: FinetuneSettings) -> None:
    """InputError for what would need a memory, or draws in batches, for each seed."""
    if settings.mix.replay or settings.draw_batch is not None:
        raise InputError(
            f"seeds trained at once have mix.replay {settings.mix.replay} and draw_batch"
            f" {settings.draw_batch}, and can have neither; set them to 0 and None, or fit the"
            " seeds one by one"
        )
