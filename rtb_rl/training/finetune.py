"""The RTB loop: draw paths, score them, weigh them, descend, remember (arXiv 2405.20971 section
2).
"""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    GroupMeanLogZ,
    backward_in_chunks,
    log_weight,
    random_levels,
    residual,
    rtb,
    steps_of_prior,
)
from rtb_rl.core.protocols import Objective
from rtb_rl.errors import NonFiniteError
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.control import LookAhead
from rtb_rl.training.diagnostics import posterior_bounds
from rtb_rl.training.ema import Average, TrainedState
from rtb_rl.training.mix import LearnedLogZ, check_mix
from rtb_rl.training.optimisers import MakeOptimiser, adamw
from rtb_rl.training.paths import Part, PathSource, merge
from rtb_rl.training.seeding import GeneratorState
from rtb_rl.training.settings import FinetuneSettings, check_beta, check_settings
from rtb_rl.training.task import Task, trainable


class Finetuner:
    """Trains `task.posterior` towards prior * r^beta; `average.module` is the result.

    With an `accelerator` of several processes each draws paths of its own and gradients are
    averaged; give each a generator of its own.

    `objective` is trajectory balance unless given; those of `core.alternatives` that are gradients
    of an expectation over the posterior need a mix of on-policy paths alone. `look_ahead` takes
    noise from the gradient at the price of more rewards, see LookAhead. `optimiser` is made from
    groups of parameters. Raises InputError for a mix that can't be drawn or grouped, for a beta
    that is no positive number and settings out of their range, and for a posterior without a
    parameter to train.
    """

    def __init__(
        self,
        task: Task,
        log_z: LearnedLogZ,
        settings: FinetuneSettings,
        *,
        generator: Generator,
        objective: Objective | None = None,
        look_ahead: bool = False,
        accelerator: Accelerator | None = None,
        optimiser: MakeOptimiser = adamw,
    ):
        check_mix(settings.mix, log_z)
        check_beta(settings.beta)
        check_settings(settings)
        self.task, self.log_z, self.settings = task, log_z, settings
        self.generator, self.accelerator = generator, accelerator
        self.objective = objective or rtb()
        self.first = steps_of_prior(task.posterior) + 1  # the lowest level with anything to learn
        self.control = LookAhead(task, self.objective) if look_ahead else None
        self.average = Average(task.posterior, settings.average_decay)
        self.paths = PathSource(task, settings, generator=generator)
        self.trained = trainable(task)
        groups = [{"params": self.trained, "lr": settings.learning_rate}]
        if learned := list(log_z.parameters()):
            groups.append({"params": learned, "lr": settings.log_z_learning_rate})
        self.optimiser = optimiser(groups)

    def update(self, step: int) -> Mapping[str, Tensor | float]:
        """One gradient step on fresh paths; what the residuals said."""
        task, settings = self.task, self.settings
        beta = settings.beta * min(1.0, (step + 1) / max(settings.beta_warmup, 1))
        decay = 1 - (1 - settings.last_learning_rate) * step / settings.updates
        self.optimiser.param_groups[0]["lr"] = settings.learning_rate * decay
        parts = self.paths.draw()
        drawn = merge(parts, settings.conditions)
        paths, ratio, log_reward = drawn.path, drawn.log_ratio, drawn.log_reward
        _check_finite(step, log_ratio=ratio)
        ratio.requires_grad_()
        weight = log_weight(log_reward, ratio.detach(), beta)
        if step == 0:
            self._start_log_z(weight, log_reward)
        log_z = self.log_z(paths.condition, weight)
        loss = self.objective(log_z, ratio, log_reward, beta)
        log_z = log_z.detach().clone()  # of this update: a scalar shares the parameter's memory
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        assert ratio.grad is not None
        if self.control is not None:
            known = log_z
            if isinstance(self.log_z, GroupMeanLogZ):
                known = self.log_z.of_others(weight)
            self.control.begin(drawn, ratio.grad, known, beta, settings.log_reward_floor)
        backward_in_chunks(
            task.diffusion,
            task.posterior,
            paths,
            ratio.grad,
            levels=self._levels(len(ratio)),
            first=self.first,
            chunk=settings.chunk,
            control=self.control,
        )
        self._average_over_processes()
        norm = nn.utils.clip_grad_norm_(self.trained, settings.gradient_clip)
        _check_finite(step, loss=loss.detach(), gradient=norm)
        self.optimiser.step()
        self.average.update(task.posterior)
        return {
            **_spread(residual(log_z, weight)),
            "rtb/loss": loss.detach(),
            "rtb/log_z": log_z.mean(),
            "rtb/log_ratio": ratio.detach().mean(),
            "rtb/log_reward": log_reward.mean(),
            "rtb/beta": beta,
            "rtb/gradient_norm": norm,
            "rtb/floored": self.paths.floored,
            **self._bounds(parts[0], beta),
        }

    def _bounds(self, part: Part, beta: float) -> Mapping[str, Tensor]:
        """Bounds of log Z from the on-policy paths of this update."""
        rows = self.settings.conditions if part.path.condition is not None else 1
        weight = log_weight(part.log_reward, part.log_ratio, beta).reshape(rows, -1)
        if not self.settings.mix.on_policy or weight.shape[1] < 2:
            return {}
        return {f"rtb/{name}": value for name, value in posterior_bounds(weight).items()}

    def _levels(self, batch: int) -> Tensor | None:
        count, levels = self.settings.levels_per_path, self.task.diffusion.levels
        if count is None or count > levels - self.first:
            return None
        return random_levels(levels, count, batch, first=self.first, generator=self.generator)

    def _start_log_z(self, weight: Tensor, log_reward: Tensor) -> None:
        """From possible points alone: the floor of the others is no estimate of anything."""
        weight, log_reward = self._of_all_processes(weight), self._of_all_processes(log_reward)
        possible = log_reward > self.settings.log_reward_floor
        self.log_z.start_at(weight[possible] if bool(possible.any()) else weight)

    def _of_all_processes(self, values: Tensor) -> Tensor:
        if self.accelerator is None:
            return values
        gathered = self.accelerator.gather(values)
        assert isinstance(gathered, Tensor)
        return gathered

    def _average_over_processes(self) -> None:
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return
        for parameter in [*self.trained, *self.log_z.parameters()]:
            # All take part: one whose steps asked this parameter nothing has a gradient of zero.
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            mean = self.accelerator.reduce(own, reduction="mean")
            assert isinstance(mean, Tensor)
            parameter.grad = mean

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold."""
        control = {} if self.control is None else {"control": self.control}
        return {
            **control,
            "posterior": TrainedState(self.task.posterior),
            "average": self.average,
            "log_z": self.log_z,
            "optimiser": self.optimiser,
            "replay": self.paths.replay,
            "generator": GeneratorState(self.generator),
        }


def _spread(residual: Tensor) -> dict[str, Tensor]:
    """The standard deviation of the residuals, which one path has not."""
    return {"rtb/residual_std": residual.std()} if len(residual) > 1 else {}


def _check_finite(step: int, **terms: Tensor) -> None:
    for name, value in terms.items():
        if not bool(value.isfinite().all()):
            bad = value[~value.isfinite()] if value.ndim else value
            raise NonFiniteError(f"{name} is {float(bad.flatten()[0])} at step {step}")
