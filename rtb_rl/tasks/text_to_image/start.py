"""A start for fine-tuning where paths of the prior are cheap: regression on rewarded paths."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Generator, Tensor, nn

from rtb_rl.core import importance_log_z, rollout
from rtb_rl.core.protocols import Condition
from rtb_rl.training.calls import NetworkCalls
from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.ema import TrainedState
from rtb_rl.training.loop import train
from rtb_rl.training.progress import progress
from rtb_rl.training.run import Run
from rtb_rl.training.scoring import score
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import complete, fingerprint
from rtb_rl.training.task import Task
from rtb_rl.training.tilt import TiltSettings, TiltTrainer

FILE = "paths.safetensors"


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
    directory: Path, task: Task, prompts: int, count: int, *, beta: float, batch: int, seed: int
) -> PromptedPaths:
    """`count` paths of the prior for each prompt, `batch` at a time, kept in a directory."""
    run = Run(directory, {"paths": count, "prior": fingerprint(task.prior), "seed": seed})
    path, device = run.directory / FILE, next(task.posterior.parameters()).device
    if run.results is None:
        begun = time.monotonic()
        generator = generator_for(seed, "start", device=device)
        numbers = torch.arange(prompts, device=device).repeat_interleave(count)
        parts: list[tuple[Tensor, Tensor]] = []
        with progress("paths of the prior", len(numbers)) as show:
            for part in numbers.split(batch):
                x = rollout(task.diffusion, task.prior, part, len(part), generator=generator).x
                parts.append((x.cpu(), score(task, x[0], part)[0].cpu()))
                show(sum(len(rewards) for _, rewards in parts), "")
        x, rewards = torch.cat([x for x, _ in parts], 1), torch.cat([r for _, r in parts])
        shaped = x.reshape(len(x), prompts, count, *x.shape[2:])
        held = {"x": shaped, "log_reward": rewards.reshape(prompts, count)}
        replace_file(path, save({name: tensor.contiguous() for name, tensor in held.items()}))
        run.finish({"seconds": time.monotonic() - begun})
    held = {name: tensor.to(device) for name, tensor in load(path.read_bytes()).items()}
    log_z, _ = importance_log_z(beta * held["log_reward"].double())
    took = (run.results or {})["seconds"]
    return PromptedPaths(held["x"], held["log_reward"], log_z.to(held["x"].dtype), took)


def fit_start(
    directory: Path,
    task: Task,
    prompts: int,
    settings: TiltSettings | None,
    beta: float,
    networks: Iterable[nn.Module],
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """Start `task.posterior`; what it took: seconds and calls of `networks`.

    The directory keeps paths of the prior and the started posterior; each is skipped when complete.
    The posterior's parameters are left as trainable as they were. Without settings it stays as it
    is, and nothing is returned. InputError for a task with a learned law of the first noise.
    """
    if settings is None:
        return {}
    count = -(-settings.paths // prompts)
    paths = prior_paths(
        directory / "paths", task, prompts, count, beta=beta, batch=batch, seed=seed
    )
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
