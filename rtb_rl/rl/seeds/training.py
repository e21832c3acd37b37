"""Updates of several seeds at once: what the trainers of one seed do, on stacked networks.

Losses are taken for each seed and summed; no parameter is shared, so that each seed has the
gradient it would have alone, and one elementwise optimiser serves all. Each seed draws from its own
generator what it would draw alone, in the same order. Rows come in equal blocks, one a seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import cast

import torch
from torch import Generator, Tensor, nn

from rtb_rl.nn.stacked import StackedEnsemble, blocks, check_alike
from rtb_rl.nn.stacked_denoiser import stack_denoisers
from rtb_rl.rl.critics.bootstrap import bootstrapped, follow
from rtb_rl.rl.critics.critic import IQLCritic, ObservationScaler
from rtb_rl.rl.critics.iql import expectile_loss
from rtb_rl.rl.critics.training import CriticSettings, new_iql
from rtb_rl.rl.data.dataset import TransitionDataset, Transitions
from rtb_rl.rl.posteriors.prior import ActionDiffusion
from rtb_rl.rl.seeds.runs import Generators
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.pretrain import DrawData, Pretrainer, PretrainSettings, random_level
from rtb_rl.training.rates import cosine


class SeedPretrainer:
    """`Pretrainer` for several models of one schedule."""

    def __init__(
        self,
        models: Sequence[ActionDiffusion],
        draw: DrawData,
        settings: PretrainSettings,
        *,
        generators: Generators,
    ):
        denoiser = stack_denoisers([model.denoiser for model in models])
        self.inner = Pretrainer(
            models[0].diffusion,
            denoiser,
            draw,
            settings,
            generator=cast(Generator, generators),
        )
        self.generators = generators

    def update(self, step: int) -> Mapping[str, Tensor]:
        """One gradient step of every seed; the losses before it."""
        inner, settings = self.inner, self.inner.settings
        rate = cosine(settings.learning_rate, step, settings.steps)
        inner.optimiser.param_groups[0]["lr"] = rate
        drawn = zip(*map(self._noised, self.generators.each), strict=True)
        x0, condition, level, x = (torch.cat(rows) for rows in drawn)
        prediction = inner.denoiser(x, level, condition)
        errors = inner.diffusion.denoising_loss(prediction, x0, x, level)
        weighed = errors * inner.level_weight(level)
        losses = blocks(weighed, len(self.generators)).mean(1)
        inner.optimiser.zero_grad(set_to_none=True)
        losses.sum().backward()
        inner.optimiser.step()
        inner.average.update(inner.denoiser)
        return {"prior/loss": losses.detach()}

    def _noised(self, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Data, conditions, levels and the data noised to them."""
        x0, condition = self.inner.draw(self.inner.settings.batch, generator=generator)
        level = random_level(len(x0), self.inner.diffusion.levels, generator=generator)
        x = self.inner.diffusion.corrupt(x0, level, generator=generator)
        return x0, cast(Tensor, condition), level, x

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold, stacked."""
        return {**self.inner.parts, "generator": self.generators}


class StackedScaler(nn.Module):
    """`ObservationScaler` for blocks of rows."""

    mean: Tensor
    std: Tensor

    def __init__(self, scalers: Sequence[ObservationScaler]):
        super().__init__()
        self.register_buffer("mean", torch.stack([scaler.mean for scaler in scalers]))
        self.register_buffer("std", torch.stack([scaler.std for scaler in scalers]))

    def forward(self, observation: Tensor) -> Tensor:
        each = blocks(observation, len(self.mean))
        return ((each - self.mean.unsqueeze(1)) / self.std.unsqueeze(1)).flatten(0, 1)


class StackedCritic(nn.Module):
    """The networks of several critics of one shape, as one."""

    def __init__(self, critics: Sequence[IQLCritic]):
        super().__init__()
        check_alike(critics)
        self.scaler = StackedScaler([critic.scaler for critic in critics])
        self.q_network = StackedEnsemble([critic.q_network for critic in critics])
        self.v_network = StackedEnsemble([critic.v_network for critic in critics])


class SeedIQL:
    """`IQL` for several critics of one shape; each draws its own batch."""

    def __init__(
        self,
        critics: Sequence[IQLCritic],
        data: TransitionDataset,
        settings: CriticSettings,
        *,
        generators: Generators,
    ):
        self.critic = StackedCritic(critics)
        self.inner = new_iql(cast(IQLCritic, self.critic), settings)
        self.data, self.batch, self.generators = data, settings.batch, generators

    def update(self, step: int) -> Mapping[str, Tensor]:
        """One gradient step of every seed."""
        losses, metrics = self._losses(self._draw())
        self.inner.optimiser.zero_grad(set_to_none=True)
        losses.sum().backward()
        self.inner.optimiser.step()
        follow(self.inner.target, self.critic.q_network, self.inner.polyak)
        return {name: values.detach() for name, values in metrics.items()}

    def _draw(self) -> Transitions:
        drawn = [self.data.sample(self.batch, generator=g) for g in self.generators.each]
        names = [field.name for field in fields(Transitions)]
        return Transitions(*(torch.cat([getattr(rows, name) for rows in drawn]) for name in names))

    def _losses(self, batch: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each seed, as in `IQL`, and what it says."""
        critic, inner, count = self.critic, self.inner, len(self.generators)
        observation = critic.scaler(batch.observations)
        inputs = torch.cat([observation, batch.actions], dim=1)
        with torch.no_grad():
            target_q = inner.target(inputs).squeeze(-1).amin(dim=0)
            next_value = critic.v_network(critic.scaler(batch.next_observations)).flatten()
            backup = bootstrapped(batch, next_value, inner.discount)
        value = critic.v_network(observation).flatten()
        q = critic.q_network(inputs).squeeze(-1)
        advantage = blocks(target_q - value, count)
        v_loss = torch.stack([expectile_loss(own, inner.expectile) for own in advantage])
        q_loss = blocks((q - backup).square().mean(0), count).mean(1)
        return v_loss + len(q) * q_loss, {
            "critic/q_loss": q_loss,
            "critic/v_loss": v_loss,
            "critic/q_mean": blocks(target_q, count).mean(1),
            "critic/v_mean": blocks(value, count).mean(1),
            "critic/advantage_mean": advantage.mean(1),
        }

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold, stacked."""
        return {"iql": self.inner, "generator": self.generators}
