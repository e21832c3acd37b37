"""A start for fine-tuning where paths of the prior are cheap: regression on rewarded paths."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import importance_log_z, rollout
from rtb_rl.core.protocols import Condition
from rtb_rl.tasks.text_to_image.reference import drawn_once
from rtb_rl.training.calls import NetworkCalls
from rtb_rl.training.ema import TrainedState
from rtb_rl.training.loop import train
from rtb_rl.training.run import Run
from rtb_rl.training.scoring import score
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import complete
from rtb_rl.training.task import Task
from rtb_rl.training.tilt import TiltSettings, TiltTrainer


@dataclass(frozen=True)
class PromptedPaths:
    """Paths of a prior, x[0..K] as [K + 1, prompts, n, C, h, w], and log r of their ends
    [prompts, n], nats; `log_z`: [prompts], of r^beta over these paths. `seconds`: what they took.
    """

    x: Tensor
    log_reward: Tensor
    log_z: Tensor
    seconds: float = 0.0

    def __call__(
        self, level: Tensor, *, generator: Generator
    ) -> tuple[Tensor, Tensor, Condition, Tensor, Tensor]:
        """One step of a random path of a random prompt for each level."""
        prompts, count = self.log_reward.shape
        rows, device = level.shape, generator.device
        number = torch.randint(prompts, rows, generator=generator, device=device)
        index = torch.randint(count, rows, generator=generator, device=device)
        return (
            self.x[level, number, index],
            self.x[level - 1, number, index],
            number,
            self.log_reward[number, index],
            self.log_z[number],
        )


@torch.no_grad()
def prior_paths(
    directory: Path,
    task: Task,
    prompts: int,
    count: int,
    *,
    beta: float,
    batch: int,
    seed: int,
    facts: Mapping[str, Any],
) -> PromptedPaths:
    """`count` paths of the prior for each prompt, `batch` at a time, kept in a directory.

    `facts`: what its configuration says of prior and prompts.
    """
    config = {"paths": count, "batch": batch, "seed": seed, "reward": task.name, **facts}
    run, device = Run(directory, config), next(task.posterior.parameters()).device
    generator = generator_for(seed, "start", device=device)

    def draw(condition: Tensor) -> dict[str, Tensor]:
        rows = len(condition)
        x = rollout(task.diffusion, task.prior, condition, rows, generator=generator).x
        return {"x": x.transpose(0, 1), "log_reward": score(task, x[0], condition)[0]}

    numbers = torch.arange(prompts, device=device)
    held, seconds = drawn_once(run, "paths", draw, numbers, count, batch=batch)
    log_z, _ = importance_log_z(beta * held["log_reward"].double())
    x = held["x"].movedim(2, 0)
    return PromptedPaths(x, held["log_reward"], log_z.to(x.dtype), seconds)


def fit_start(
    directory: Path,
    task: Task,
    prompts: int,
    settings: TiltSettings | None,
    beta: float,
    networks: Iterable[nn.Module],
    batch: int,
    seed: int,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Start `task.posterior`; what it took: seconds and calls of `networks`.

    The directory keeps paths of the prior and the started posterior; each is skipped when complete.
    `facts`: what the configuration of the paths says of prior and prompts.
    The posterior's parameters are left as trainable as they were. Without settings it stays as it
    is, and nothing is returned. InputError for a task with a learned law of the first noise.
    """
    if settings is None:
        return {}
    count = -(-settings.paths // prompts)
    place = directory / "paths"
    paths = prior_paths(place, task, prompts, count, beta=beta, batch=batch, seed=seed, facts=facts)
    generator = generator_for(seed, "tilt", device=paths.x.device)
    trainer = TiltTrainer(task, paths, beta, settings, generator=generator)
    config = {"task": task.name, "beta": beta, "settings": asdict(settings), "seed": seed}
    run = Run(directory / "tilt", config)

    def fit() -> dict[str, Any]:
        calls = NetworkCalls(networks)
        seconds = train(
            run,
            trainer.update,
            {**trainer.parts, "network_calls": calls},
            steps=settings.steps,
            description="start",
            log_every=20,
            checkpoint_every=200,
        )
        calls.stop()
        task.posterior.load_state_dict(trainer.average.module.state_dict())
        return {"seconds": seconds, "network_calls": calls.total}

    complete(run, task.posterior, fit, part=TrainedState(task.posterior))
    for parameter in trainer.trained:
        parameter.requires_grad_(True)
    found = run.results or {}
    return {
        "seconds": found["seconds"] + paths.seconds,
        "network_calls": count * prompts * task.diffusion.levels + found["network_calls"],
    }
