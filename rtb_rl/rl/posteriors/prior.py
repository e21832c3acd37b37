"""The behaviour prior mu(a | s): a diffusion over actions given observations."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    GaussianDiffusion,
    Sampler,
    VelocityPrediction,
    log_snr_schedule,
    zero_terminal_signal,
)
from rtb_rl.core.gaussian import calibrated_spread, small_spread
from rtb_rl.nn import ResidualMLP
from rtb_rl.rl.data.dataset import TransitionDataset, data_facts
from rtb_rl.training.loop import train
from rtb_rl.training.pretrain import DrawData, Pretrainer, PretrainSettings
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import complete, device_for_training

CALIBRATION_ROWS = 20_000


@dataclass(frozen=True)
class ActionNetwork:
    """Sizes of the diffusion over actions."""

    levels: int = 10
    """Denoising steps K."""
    width: int = 256
    blocks: int = 2


class ActionDiffusion(nn.Module):
    """A Gaussian diffusion over actions in [-1, 1] and a denoiser conditioned on observations.

    A variance-preserving schedule even in log signal-to-noise that ends in pure noise; velocity
    prediction by a residual MLP; steps whose spread is set after pretraining.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        network: ActionNetwork,
        *,
        generator: Generator,
    ):
        super().__init__()
        schedule = zero_terminal_signal(log_snr_schedule(network.levels))
        spread = small_spread(schedule, floor=0.02)[:, None].expand(-1, action_size)
        self.diffusion = GaussianDiffusion(schedule, (action_size,), spread)
        residual_mlp = ResidualMLP(
            action_size,
            network.levels,
            condition_size=observation_size,
            width=network.width,
            blocks=network.blocks,
            generator=generator,
        )
        self.denoiser: nn.Module = VelocityPrediction(residual_mlp, schedule)

    @property
    def sampler(self) -> Sampler:
        """Draws actions for observations."""
        return Sampler(self.diffusion, self.denoiser)

    @property
    def device(self) -> torch.device:
        return self.diffusion.signal.device


def fit_prior(
    directory: str | Path,
    dataset: TransitionDataset,
    settings: PretrainSettings | None = None,
    network: ActionNetwork | None = None,
    *,
    seed: int = 0,
) -> ActionDiffusion:
    """The diffusion of the data's actions given their observations."""
    settings, network = settings or PretrainSettings(), network or ActionNetwork()
    run, model = open_prior(directory, dataset, settings, network, seed=seed)
    data = dataset.to(model.device)

    def fit() -> dict[str, Any]:
        model.denoiser.network.standardise(data.observations)  # type: ignore[operator]
        generator = generator_for(seed, "prior", device=model.device)
        draw = draw_actions(data)
        trainer = Pretrainer(model.diffusion, model.denoiser, draw, settings, generator=generator)
        seconds = train(
            run, trainer.update, trainer.parts, steps=settings.steps, description="prior"
        )
        model.denoiser.load_state_dict(trainer.average.module.state_dict())
        return {"seconds": seconds, "spread": calibrate(model, data, seed=seed)}

    complete(run, model, fit)
    return model


def open_prior(
    directory: str | Path,
    dataset: TransitionDataset,
    settings: PretrainSettings,
    network: ActionNetwork,
    *,
    seed: int,
) -> tuple[Run, ActionDiffusion]:
    """The run of a prior's stage, and the model as it starts."""
    run = Run(directory, prior_config(dataset, settings, network, seed=seed))
    initial = generator_for(seed, "prior", "initial")
    model = ActionDiffusion(
        dataset.observation_size, dataset.action_size, network, generator=initial
    )
    return run, model.to(device_for_training())


def prior_config(
    dataset: TransitionDataset,
    settings: PretrainSettings,
    network: ActionNetwork | None = None,
    *,
    seed: int,
) -> dict[str, Any]:
    """The configuration of a prior's stage."""
    made_by = {"network": asdict(network or ActionNetwork()), "pretrain": asdict(settings)}
    return {**data_facts(dataset), **made_by, "seed": seed}


def draw_actions(data: TransitionDataset) -> DrawData:
    """Actions of the data, each with the observation it was taken for."""

    def draw(n: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
        batch = data.sample(n, generator=generator)
        return batch.actions, batch.observations

    return draw


def calibrate(model: ActionDiffusion, data: TransitionDataset, *, seed: int) -> list[float]:
    """Set the spread of the steps from the data; returns its mean over coordinates, [levels]."""
    generator = generator_for(seed, "calibration", device=model.device)
    rows = min(CALIBRATION_ROWS, len(data))
    x0, condition = draw_actions(data)(rows, generator=generator)
    std = calibrated_spread(model.diffusion, model.denoiser, x0, condition, generator=generator)
    model.diffusion = model.diffusion.with_spread(std)
    return std.mean(1).tolist()
