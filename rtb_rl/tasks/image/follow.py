"""A posterior that learns to follow a guided chain, on paths of its own.

A step of Gaussian spread s that should have mean m' and has m is off by |m' - m|^2 / (2 s^2) nats;
summed over the steps of a path this is the divergence of the posterior from the guided chain. It is
the local form of trajectory balance: where the guide is right and it is zero, so is every residual.
Unlike gradients of whole paths these have no noise but the choice of paths.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import GaussianDiffusion, conditions, rollout
from rtb_rl.core.protocols import Condition
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.ema import Average, TrainedState
from rtb_rl.training.pretrain import random_level
from rtb_rl.training.rates import cosine
from rtb_rl.training.seeding import GeneratorState
from rtb_rl.training.task import Task


@dataclass(frozen=True)
class FollowSettings:
    """How a posterior learns to follow."""

    steps: int = 1200
    batch: int = 128
    paths: int = 150
    """Drawn from the posterior at a time."""
    every: int = 30
    """Steps between two times."""
    kept: int = 10
    """Times whose paths are learned from."""
    learning_rate: float = 5e-4
    """Falls to zero along a cosine."""
    average_decay: float = 0.98


class Follower:
    """Moves `task.posterior` to the steps of a guided chain, along the posterior's own paths."""

    name = "start"

    def __init__(
        self, task: Task, guided: nn.Module, settings: FollowSettings, *, generator: Generator
    ):
        self.task, self.guided, self.settings = task, guided, settings
        self.generator = generator
        self.average = Average(task.posterior, settings.average_decay)
        self.trained = [p for p in task.posterior.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.trained, settings.learning_rate, weight_decay=0.0, fused=True
        )
        self.seen = _Seen(settings.kept, self.trained[0].device)

    def update(self, step: int) -> Mapping[str, Tensor]:
        """One gradient step; `start/divergence` from the guided chain in nats a path."""
        settings, diffusion = self.settings, gaussian(self.task)
        self.optimiser.param_groups[0]["lr"] = cosine(settings.learning_rate, step, settings.steps)
        if step % settings.every == 0:
            self._look()
        x, wanted, level, condition = self.seen.draw(settings.batch, generator=self.generator)
        found = diffusion.kernel(self.task.posterior(x, level, condition), x, level)
        off = (found.mean - wanted) / found.std
        loss = diffusion.levels * (off.square().flatten(1).sum(1) / 2).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        self.average.update(self.task.posterior)
        return {"start/divergence": loss.detach()}

    @torch.no_grad()
    def _look(self) -> None:
        """Paths of the posterior as it is, and where the guide would have gone at each step."""
        task, diffusion = self.task, gaussian(self.task)
        paths, generator = self.settings.paths, self.generator
        condition, _ = task.draw_conditions(paths, generator=generator)
        path = rollout(diffusion, self.average.module, condition, paths, generator=generator)
        wanted = []
        for k in range(1, diffusion.levels + 1):
            level = torch.full((paths,), k, device=path.x.device)
            step = diffusion.kernel(self.guided(path.x[k], level, condition), path.x[k], level)
            wanted.append(step.mean)
        self.seen.add(path.x[1:], torch.stack(wanted), condition)

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold."""
        return {
            "posterior": TrainedState(self.task.posterior),
            "average": self.average,
            "optimiser": self.optimiser,
            "seen": self.seen,
            "generator": GeneratorState(self.generator),
        }


class _Seen:
    """Points of the last few batches of paths, [levels, paths, *event], and the means asked for."""

    def __init__(self, kept: int, device: torch.device):
        self.kept, self.device = kept, device
        self.tables: dict[str, Tensor] = {}
        self.condition: Condition = None

    def add(self, x: Tensor, wanted: Tensor, condition: Condition) -> None:
        new = {"x": x, "wanted": wanted}
        if self.tables:
            held, paths = self.tables["x"].shape[1], x.shape[1]
            later = slice(max(0, held + paths - self.kept * paths), None)
            new = {name: torch.cat([self.tables[name][:, later], new[name]], 1) for name in new}
            earlier = conditions.take(self.condition, later)
            condition = conditions.concatenate([earlier, condition])
        self.tables, self.condition = new, condition

    def draw(self, n: int, *, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Condition]:
        """`n` steps: x, wanted mean, level and condition; any kept step as likely as another."""
        x, wanted = self.tables["x"], self.tables["wanted"]
        level = random_level(n, x.shape[0], generator=generator)
        index = torch.randint(x.shape[1], (n,), generator=generator, device=generator.device)
        each = conditions.take(self.condition, index)
        return x[level - 1, index], wanted[level - 1, index], level, each

    def state_dict(self) -> dict[str, Any]:
        return {"tables": self.tables, "condition": self.condition}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tables = {name: table.to(self.device) for name, table in state["tables"].items()}
        self.condition = conditions.move(state["condition"], self.device)


def gaussian(task: Task) -> GaussianDiffusion:
    """The task's diffusion, known to be Gaussian."""
    assert isinstance(task.diffusion, GaussianDiffusion)
    return task.diffusion
