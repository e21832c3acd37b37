"""A start for fine-tuning where draws of the prior are cheap: regression on rewarded draws."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rtb_rl.adapters.text_to_image import TextToImagePrior
from rtb_rl.core.protocols import Condition
from rtb_rl.tasks.text_to_image.reference import PriorDraws, prior_draws
from rtb_rl.tasks.text_to_image.target import PromptTarget
from rtb_rl.training.calls import NetworkCalls
from rtb_rl.training.ema import TrainedState
from rtb_rl.training.loop import train
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import complete
from rtb_rl.training.task import Task
from rtb_rl.training.tilt import TiltSettings, TiltTrainer


@dataclass(frozen=True)
class PromptedDraws:
    """Rewarded draws of a prior, each with the prompt that it was drawn for and that prompt's log Z
    at this beta.
    """

    draws: PriorDraws
    beta: float

    def __call__(self, n: int, *, generator: Generator) -> tuple[Tensor, Condition, Tensor, Tensor]:
        prompts, count = self.draws.log_reward.shape
        device = generator.device
        number = torch.randint(prompts, (n,), generator=generator, device=device)
        index = torch.randint(count, (n,), generator=generator, device=device)
        log_reward = self.draws.log_reward[number, index]
        log_z = self.draws.weighted(self.beta).log_z.to(log_reward.dtype)
        return self.draws.x0[number, index], number, log_reward, log_z[number]


def fit_start(
    directory: Path,
    prior: TextToImagePrior,
    target: PromptTarget,
    task: Task,
    settings: TiltSettings | None,
    beta: float,
    networks: Iterable[nn.Module],
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """Start `task.posterior`; what it took: seconds and calls of `networks`.

    The directory keeps draws of the prior and the started posterior; each is skipped when complete.
    The posterior's parameters are left as trainable as they were. Without settings it stays as it
    is, and nothing is returned. InputError for a task with a learned law of the first noise.
    """
    if settings is None:
        return {}
    prompts = len(target.prompts)
    count = -(-settings.draws // prompts)
    draws = prior_draws(
        directory / "draws", prior, target, count, batch=batch, seed=seed, purpose="start"
    )
    generator = generator_for(seed, "tilt", device=draws.x0.device)
    rewarded = PromptedDraws(draws, beta)
    trainer = TiltTrainer(task, rewarded, beta, settings, generator=generator)
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
        "seconds": draws.seconds + found["seconds"],
        "network_calls": count * prompts * prior.diffusion.levels + found["network_calls"],
    }
