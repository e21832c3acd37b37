"""Policy gradients over denoising steps, by any surrogate of `baselines.surrogates`."""

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from rtb_rl.baselines.surrogates import Steps, Surrogate
from rtb_rl.baselines.trainer import BaselineSettings, Learner
from rtb_rl.core import Kernel, Trajectory
from rtb_rl.core.protocols import Condition
from rtb_rl.core.trajectory import steps_in_chunks
from rtb_rl.errors import InputError
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.scoring import score
from rtb_rl.training.task import Task


class PolicyGradient:
    """Trains `task.posterior` by a surrogate on its own paths; `average.module` is the result.

    Memory grows with `settings.chunk` rows, not with K. InputError for a group of one path, which
    has nothing to be compared with.
    """

    def __init__(
        self,
        task: Task,
        settings: BaselineSettings,
        *,
        surrogate: Surrogate,
        generator: Generator,
    ):
        self.task, self.settings, self.surrogate = task, settings, surrogate
        self.learner = Learner(task, settings, generator=generator)
        self.average = self.learner.average

    def update(self, step: int) -> Mapping[str, Tensor | float]:
        """Fresh paths and `surrogate.passes` gradient steps on them; what they said."""
        learner, settings = self.learner, self.settings
        paths = learner.draw()
        log_reward, floored = score(
            self.task, paths.x0, paths.condition, floor=settings.log_reward_floor
        )
        advantage = self.advantage(settings.beta * log_reward, paths.condition)
        levels = learner.levels(len(advantage))
        loss, norm, first = self._descend(step, paths, advantage, levels, None)
        last = first
        for _ in range(1, self.surrogate.passes):
            loss, norm, last = self._descend(step, paths, advantage, levels, first)
        return {
            "policy/log_reward": log_reward.mean(),
            "policy/log_reward_std": log_reward.std(correction=0),
            "policy/loss": loss,
            "policy/moved": (torch.cat(first) - torch.cat(last)).mean(),
            "policy/gradient_norm": norm,
            "policy/floored": floored,
            "policy/calls": self.calls,
        }

    def _descend(
        self,
        step: int,
        paths: Trajectory,
        advantage: Tensor,
        levels: Tensor,
        old: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        self.learner.begin(step)
        loss, log_probs = self.accumulate(paths, advantage, levels, old)
        return loss, self.learner.descend(step, loss), log_probs

    def advantage(self, reward: Tensor, condition: Condition) -> Tensor:
        """The advantage of each path within its condition, or within the batch: [batch]."""
        groups = 1 if condition is None else self.settings.conditions
        if len(reward) == groups:
            raise InputError(
                f"{len(reward)} paths for {groups} conditions leave groups of one path, with"
                " nothing to compare it with; set paths to 2 or more"
            )
        return self.surrogate.advantage(reward.reshape(groups, -1)).flatten()

    def accumulate(
        self, paths: Trajectory, advantage: Tensor, levels: Tensor, old: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Add the gradient of sum_k loss, mean over paths; that loss, and log p of each step.

        `levels` [count, batch], a subset being scaled by K / count. `old`: the log p of the first
        pass, in the chunks in which they were returned; None in the first.
        """
        learner, diffusion = self.learner, self.task.diffusion
        total, log_probs = torch.zeros((), device=advantage.device), []
        chunks = steps_in_chunks(paths, levels, self.settings.chunk)
        for index, (x_before, x, level, condition, path) in enumerate(chunks):
            kernel = diffusion.kernel(learner.posterior(x, level, condition), x, level)
            log_prob = kernel.log_prob(x_before)
            log_probs.append(log_prob.detach())
            steps = Steps(
                kernel,
                log_prob,
                log_probs[index] if old is None else old[index],
                advantage[path],
                level,
                x[0].numel(),
                lambda x=x, level=level, condition=condition: self._prior(x, level, condition),
            )
            loss = self.surrogate.loss(steps).sum() * learner.share(levels)
            learner.add_gradient(loss)
            total = total + loss.detach()
        return total, log_probs

    @torch.no_grad()
    def _prior(self, x: Tensor, level: Tensor, condition: Condition) -> Kernel:
        return self.task.diffusion.kernel(self.learner.prior(x, level, condition), x, level)

    @property
    def calls(self) -> int:
        """Rows sent through prior or posterior so far; a backward pass counts as two more."""
        return self.learner.calls.total

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold."""
        return self.learner.parts
