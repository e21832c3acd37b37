"""The start from rewarded draws as a stage of a run, resumable."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from rtb_rl.core import steps_of_prior
from rtb_rl.training.calls import NetworkCalls
from rtb_rl.training.ema import TrainedState
from rtb_rl.training.loop import train
from rtb_rl.training.rewarded import RewardedSettings, RewardedTrainer
from rtb_rl.training.rewarded_draws import RewardedDraws
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import complete
from rtb_rl.training.task import Task


def fit_rewarded(
    directory: Path,
    task: Task,
    draws: RewardedDraws,
    settings: RewardedSettings,
    *,
    beta: float,
    networks: Iterable[nn.Module],
    new_inputs: Iterable[nn.Parameter] = (),
    seed: int,
) -> dict[str, Any]:
    """Move `task.posterior` to the denoiser of its target; the seconds and the calls of `networks`
    that it took, and how many last steps are the prior's.

    Kept in the directory, and skipped where it is complete. The posterior's parameters are left as
    trainable as they were. InputError for a task with a learned law of the first noise.
    """
    trained = [p for p in task.posterior.parameters() if p.requires_grad]
    config = {"task": task.name, "beta": beta, "settings": asdict(settings), "seed": seed}
    run = Run(directory, config)

    def fit() -> dict[str, Any]:
        generator = generator_for(seed, "rewarded", device=draws.x0.device)
        calls = NetworkCalls(networks)
        given = {"new_inputs": new_inputs, "generator": generator}
        trainer = RewardedTrainer(task, draws, beta, settings, **given)
        seconds = train(
            run,
            trainer.update,
            {**trainer.parts, "network_calls": calls},
            steps=settings.steps,
            description=trainer.name,
            log_every=20,
            checkpoint_every=200,
        )
        calls.stop()
        task.posterior.load_state_dict(trainer.average.module.state_dict())
        left = steps_of_prior(task.posterior)
        return {"seconds": seconds, "network_calls": calls.total, "prior_steps": left}

    complete(run, task.posterior, fit, part=TrainedState(task.posterior))
    for parameter in trained:
        parameter.requires_grad_(True)
    found = run.results or {}
    return {name: found[name] for name in ("seconds", "network_calls", "prior_steps")}
