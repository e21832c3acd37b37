"""A start for fine-tuning: a guide learned from rewards of draws, which the posterior follows."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtb_rl.adapters.pipelines import PipelinePrior
from rtb_rl.adapters.unets import Encode, UNetInputs
from rtb_rl.core import conditions, log_weight, rollout_against
from rtb_rl.errors import InputError
from rtb_rl.nn.value import ConvValue
from rtb_rl.tasks.image.follow import Follower, FollowSettings, gaussian
from rtb_rl.tasks.image.guide import Guide, GuidedDenoiser, ValueSettings, ValueTrainer
from rtb_rl.tasks.image.prior import prior_draws
from rtb_rl.tasks.image.target import ImageTarget
from rtb_rl.training.calls import NetworkCalls
from rtb_rl.training.ema import TrainedState
from rtb_rl.training.loop import train
from rtb_rl.training.run import Run
from rtb_rl.training.scoring import score
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import complete
from rtb_rl.training.task import Task

BATCH = 1000  # draws rewarded at once


@dataclass(frozen=True)
class StartSettings:
    """How a posterior is started."""

    value: ValueSettings = field(default_factory=ValueSettings)
    strengths: tuple[float, ...] = (0.0, 1.0, 1.4, 1.8)
    """Of the guide; that of the highest ELBO is followed. A learned value is too flat: more than
    one is usual. Zero is the prior."""
    trial_paths: int = 300
    """Guided paths for each strength."""
    follow: FollowSettings = field(default_factory=FollowSettings)

    def __post_init__(self):
        if not self.strengths:
            raise InputError("strengths has none to choose from; give at least one, such as 1.0")


@torch.no_grad()
def elbo_of_strengths(
    task: Task, guided: GuidedDenoiser, settings: StartSettings, beta: float, *, seed: int
) -> dict[float, float]:
    """Strength -> ELBO of guided paths, nats; the same noise for each."""
    found = {}
    for strength in settings.strengths:
        guided.strength = strength
        paths = settings.trial_paths
        generator = generator_for(seed, "trial", device=gaussian(task).signal.device)
        condition, _ = task.draw_conditions(paths, generator=generator)
        path, ratio = rollout_against(
            task.diffusion, guided, task.prior, condition, paths, generator=generator
        )
        weight = log_weight(score(task, path.x0, condition)[0], ratio, beta)
        found[strength] = float(weight.mean())
    return found


def fit_start(
    directory: Path,
    prior: PipelinePrior,
    target: ImageTarget,
    task: Task,
    settings: StartSettings | None,
    beta: float,
    networks: set[nn.Module],
    seed: int,
) -> dict[str, Any]:
    """Start `task.posterior`; what it took: seconds and calls of `networks`, strength and ELBOs.

    The directory keeps draws of the prior, the value and the started posterior; each is skipped
    when complete. The posterior's parameters are left as trainable as they were. Without settings
    it stays as it is, and nothing is returned.
    """
    if settings is None:
        return {}
    trained = [p for p in task.posterior.parameters() if p.requires_grad]
    draws = prior_draws(
        directory / "draws", prior, settings.value.draws, seed=seed, purpose="start"
    )
    drawn = json.loads((directory / "draws" / "results.json").read_text())
    config = {"task": task.name, "beta": beta, "settings": asdict(settings), "seed": seed}

    guide = new_guide(task, draws, settings.value, beta, encode=target.encode, seed=seed)
    generator = generator_for(seed, "value", device=draws.device)
    valuing = ValueTrainer(task, guide, draws, beta, settings.value, generator=generator)
    run = Run(directory / "value", config)
    value = _fit(run, guide.network, valuing, settings.value.steps, networks)

    guided = GuidedDenoiser(guide)
    generator = generator_for(seed, "follow", device=draws.device)
    follower = Follower(task, guided, settings.follow, generator=generator)

    def choose() -> dict[str, Any]:
        elbos = elbo_of_strengths(task, guided, settings, beta, seed=seed)
        guided.strength = max(elbos, key=lambda strength: elbos[strength])
        told = {str(strength): elbo for strength, elbo in elbos.items()}
        return {"strength": guided.strength, "elbos": told}

    run = Run(directory / "follow", config)
    averaged = [m for m in follower.average.module.modules() if type(m) in map(type, networks)]
    counted = {*networks, *averaged}  # it draws from the average
    follow = _fit(run, task.posterior, follower, settings.follow.steps, counted, choose)
    for parameter in trained:
        parameter.requires_grad_(True)
    calls = len(draws) * prior.diffusion.levels
    return {
        "strength": follow["strength"],
        "elbos": follow["elbos"],
        "seconds": drawn["seconds"] + value["seconds"] + follow["seconds"],
        "network_calls": calls + value["network_calls"] + follow["network_calls"],
    }


def new_guide(
    task: Task,
    draws: Tensor,
    settings: ValueSettings,
    beta: float,
    *,
    encode: Encode | None,
    seed: int,
) -> Guide:
    """An untrained guide for a task; its bound is the largest r^beta of the draws."""
    generator = generator_for(seed, "bound", device=draws.device)
    condition, _ = task.draw_conditions(len(draws), generator=generator)
    log_reward = torch.cat(
        [
            score(task, draws[part], conditions.take(condition, part))[0]
            for part in torch.arange(len(draws), device=draws.device).split(BATCH)
        ]
    )
    labels, channels = (
        UNetInputs() if encode is None else encode(conditions.take(condition, slice(2)))
    )
    _, depth, height, width = draws.shape
    seen = 2 * depth + (0 if channels is None else channels.shape[1])
    network = ConvValue(
        (seen, height, width),
        task.diffusion.levels,
        classes=None if labels is None else _classes(task.posterior),
        width=settings.width,
        generator=generator_for(seed, "value", "initial"),
    ).to(draws.device)
    bound = beta * float(log_reward.max())
    return Guide(gaussian(task), task.prior, network, encode=encode, log_bound=bound)


def _fit(
    run: Run,
    module: nn.Module,
    trainer: ValueTrainer | Follower,
    steps: int,
    networks: set[nn.Module],
    begin: Callable[[], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """A stage: what it took, and what `begin` said of it before the first step."""

    def fit() -> dict[str, Any]:
        calls = NetworkCalls(networks)
        told = begin()
        parts = {**trainer.parts, "network_calls": calls}
        seconds = train(
            run,
            trainer.update,
            parts,
            steps=steps,
            description=trainer.name,
            log_every=20,
            checkpoint_every=300,
        )
        calls.stop()
        module.load_state_dict(trainer.average.module.state_dict())
        return {**told, "seconds": seconds, "network_calls": calls.total}

    complete(run, module, fit, part=TrainedState(module))
    return dict(run.results or {})


def _classes(posterior: nn.Module) -> int:
    """How many labels the posterior's U-Net knows."""
    tables = (m for m in posterior.modules() if isinstance(m, nn.Embedding))
    return next(tables).num_embeddings
