"""Fine-tuning of several seeds as one Task: rows come in equal blocks, one a seed.

Each seed has its own prior, critic and generator; `core` sees one diffusion, one denoiser and one
batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import ConditionalLogZ, Diffusion, GaussianKernel, LogReward, ScaledPrediction
from rtb_rl.core.protocols import Condition
from rtb_rl.nn import MLP
from rtb_rl.nn.stacked import StackedMLP, blocks, stack
from rtb_rl.nn.stacked_denoiser import look_up, stack_denoisers
from rtb_rl.rl.critics.critic import Critic
from rtb_rl.rl.data.dataset import TransitionDataset
from rtb_rl.rl.posteriors.prior import ActionDiffusion
from rtb_rl.rl.posteriors.task import critic_log_reward, dataset_rows
from rtb_rl.rl.seeds.runs import Generators
from rtb_rl.training.task import DrawConditions, Task


@dataclass(frozen=True)
class SeedKernel:
    """A GaussianKernel whose blocks draw from a generator each."""

    kernel: GaussianKernel

    def sample(self, *, generator: Generators) -> Tensor:
        count = len(generator)
        laws = zip(blocks(self.kernel.mean, count), blocks(self.kernel.std, count), strict=True)
        kernels = [GaussianKernel(mean, std) for mean, std in laws]
        pairs = zip(kernels, generator.each, strict=True)
        return torch.cat([kernel.sample(generator=own) for kernel, own in pairs])

    def log_prob(self, x: Tensor) -> Tensor:
        return self.kernel.log_prob(x)

    def log_ratio(self, other: "SeedKernel", x: Tensor) -> Tensor:
        return self.kernel.log_ratio(other.kernel, x)

    def widened(self, factor: float) -> "SeedKernel":
        return SeedKernel(self.kernel.widened(factor))


class SeedDiffusion:
    """The diffusions of several models of one schedule, each with the spread of its steps.

    What fine-tuning needs of a Diffusion; `generator` is a Generators throughout.
    """

    def __init__(self, models: Sequence[ActionDiffusion]):
        self.first = models[0].diffusion
        self.std = torch.stack([model.diffusion.std for model in models])
        self.levels, self.event_shape = self.first.levels, self.first.event_shape
        self.signal_left = self.first.signal_left

    def start(self, batch: int, *, generator: Generators) -> Tensor:
        rows = batch // len(generator)
        return generator.cat(lambda own: self.first.start(rows, generator=own))

    def kernel(self, prediction: Tensor | ScaledPrediction, x: Tensor, level: Tensor) -> SeedKernel:
        x0 = prediction.x0 if isinstance(prediction, ScaledPrediction) else prediction
        mean = self.first.kernel(x0, x, level).mean
        std = look_up(self.std, level).to(mean.dtype)
        if isinstance(prediction, ScaledPrediction):
            std = std * prediction.log_scale.exp()
        return SeedKernel(GaussianKernel(mean, std))

    def noise_path(self, x0: Tensor, *, generator: Generators) -> Tensor:
        pairs = zip(blocks(x0, len(generator)), generator.each, strict=True)
        return torch.cat([self.first.noise_path(own, generator=g) for own, g in pairs], 1)


class StackedLogZ(nn.Module):
    """`ConditionalLogZ` for blocks of rows, around networks of one shape."""

    scale: Tensor

    def __init__(self, estimates: Sequence[ConditionalLogZ]):
        super().__init__()
        self.network = StackedMLP([cast(MLP, estimate.network) for estimate in estimates])
        self.offset = stack([estimate.offset for estimate in estimates])
        self.register_buffer("scale", torch.stack([estimate.scale for estimate in estimates]))

    @torch.no_grad()
    def start_at(self, log_weight: Tensor) -> None:
        each = blocks(log_weight, len(self.offset))
        self.offset.copy_(each.mean(1))
        self.scale.copy_(each.std(1, correction=0).clamp(min=1))

    def forward(self, condition: Tensor, log_weight: Tensor) -> Tensor:
        output = self.network(condition).reshape(len(self.offset), -1)
        return (self.offset[:, None] + self.scale[:, None] * output).flatten()


def seed_task(
    dataset: TransitionDataset,
    priors: Sequence[ActionDiffusion],
    posteriors: Sequence[ActionDiffusion],
    critics: Sequence[Critic],
) -> Task:
    """`offline_rl_task` of every seed, as one."""
    return Task(
        name=dataset.name,
        diffusion=cast(Diffusion, SeedDiffusion(priors)),
        prior=stack_denoisers([prior.denoiser for prior in priors]),
        posterior=stack_denoisers([posterior.denoiser for posterior in posteriors]),
        log_reward=_log_reward(critics),
        draw_conditions=_rows(dataset),
    )


def _log_reward(critics: Sequence[Critic]) -> LogReward:
    each = [critic_log_reward(critic) for critic in critics]

    def log_reward(x0: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, Tensor)
        rows = zip(each, blocks(x0, len(each)), blocks(condition, len(each)), strict=True)
        return torch.cat([own(x, given) for own, x, given in rows])

    return log_reward


def _rows(dataset: TransitionDataset) -> DrawConditions:
    draw = dataset_rows(dataset)

    def draw_each(n: int, *, generator: Generator) -> tuple[Condition, Tensor | None]:
        each = cast(Generators, generator).each
        drawn = [draw(n // len(each), generator=own) for own in each]
        observations, actions = zip(*drawn, strict=True)
        return torch.cat(observations), torch.cat(actions)

    return draw_each
