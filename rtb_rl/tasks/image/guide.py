"""A guide from prior to posterior: what a noisy image is worth, learned from rewards of draws.

With m the mean of the prior's step from level k and s its spread, let h(m) = E[r(x_0)^beta | m]
under the prior. The posterior's step is the prior's times the value of where it ends; h is that
value smoothed by N(0, s^2 I), so the mean of the posterior's step is

    m + s^2 grad log h(m)

(Doob's transform and Stein's identity). It needs no gradient of the reward.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from rtb_rl.adapters.unets import Encode, UNetInputs
from rtb_rl.core import GaussianDiffusion
from rtb_rl.core.protocols import Condition, Denoiser
from rtb_rl.nn.value import ConvValue
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.ema import Average
from rtb_rl.training.pretrain import random_level
from rtb_rl.training.rates import cosine
from rtb_rl.training.scoring import score
from rtb_rl.training.seeding import GeneratorState
from rtb_rl.training.task import Task


@dataclass(frozen=True)
class ValueSettings:
    """How noisy images are valued."""

    draws: int = 6000
    """Of the prior, whose rewards are learned from."""
    steps: int = 1500
    batch: int = 128
    """Draws."""
    conditions: int = 8
    """For each draw, of a target that has them."""
    width: int = 32
    """Channels of the first layer."""
    learning_rate: float = 1e-3
    """Falls to zero along a cosine."""
    average_decay: float = 0.98


class Guide:
    """The value of noisy images, and the pull that it exerts on a step.

    `network` sees m, the prediction of x_0 from m one level further down by the prior, which has no
    conditions, and what `encode` makes of the condition. log h = `log_bound` + log sigmoid of what
    it returns, so that exp(log_bound) should be the largest r^beta.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        prior: Denoiser,
        network: ConvValue,
        *,
        encode: Encode | None = None,
        log_bound: float = 0.0,
    ):
        self.diffusion, self.prior, self.network = diffusion, prior, network
        self.encode, self.log_bound = encode, log_bound

    def logit(self, mean: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """Of h / exp(log_bound): [batch].

        The condition may have several rows an image, neighbours of one image: [batch * times].
        """
        labels, channels = UNetInputs() if self.encode is None else self.encode(condition)
        if channels is not None:
            times = len(channels) // len(mean)
            mean, level = (rows.repeat_interleave(times, 0) for rows in (mean, level))
        with torch.set_grad_enabled(mean.requires_grad):
            below = self.prior(mean, (level - 1).clamp(min=1), None)
        last = (level == 1).reshape(-1, *(1,) * (mean.ndim - 1))
        clean = torch.where(last, mean, below)  # a step to level 0 ends in the image itself
        seen = [mean, clean, *([] if channels is None else [channels.to(mean.dtype)])]
        return self.network(torch.cat(seen, 1), level, labels)

    def log_value(self, mean: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """log h(m): [batch], nats."""
        return self.log_bound + functional.logsigmoid(self.logit(mean, level, condition))

    def pull(self, mean: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """s grad log h(m), how many spreads the step is moved: shaped as m, without graph."""
        with torch.enable_grad():
            mean = mean.detach().requires_grad_()
            value = self.log_value(mean, level, condition).sum()
            (gradient,) = torch.autograd.grad(value, mean)
        return self.diffusion.std[level].to(gradient) * gradient


class GuidedDenoiser(nn.Module):
    """The prior, its steps moved by `strength` pulls of a guide."""

    def __init__(self, guide: Guide, strength: float = 1.0):
        super().__init__()
        self.guide, self.strength = guide, strength

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        diffusion = self.guide.diffusion
        x0 = self.guide.prior(x, level, condition)
        if self.strength == 0:
            return x0
        step = diffusion.kernel(x0, x, level)
        moved = self.strength * step.std * self.guide.pull(step.mean, level, condition)
        return x0 + moved / diffusion.weight_x0[level].to(x0)


class ValueTrainer:
    """Fits a guide's network to r^beta of draws of the prior, seen through noise.

    The noised draw's step of the prior gives m; cross entropy against r^beta / exp(log_bound) is
    least at log h. One level a draw, uniform.
    """

    name = "value"

    def __init__(
        self,
        task: Task,
        guide: Guide,
        draws: Tensor,
        beta: float,
        settings: ValueSettings,
        *,
        generator: Generator,
    ):
        self.task, self.guide, self.draws, self.beta = task, guide, draws, beta
        self.settings, self.generator = settings, generator
        self.average = Average(guide.network, settings.average_decay)
        self.optimiser = torch.optim.AdamW(
            guide.network.parameters(), settings.learning_rate, weight_decay=1e-2, fused=True
        )

    def update(self, step: int) -> Mapping[str, Tensor]:
        """One gradient step."""
        settings, diffusion = self.settings, self.guide.diffusion
        self.optimiser.param_groups[0]["lr"] = cosine(settings.learning_rate, step, settings.steps)
        x0, condition, share = self._rewarded(settings.batch)
        level = random_level(len(x0), diffusion.levels, generator=self.generator)
        x = diffusion.corrupt(x0, level, generator=self.generator)
        with torch.no_grad():
            mean = diffusion.kernel(self.guide.prior(x, level, None), x, level).mean
        logit = self.guide.logit(mean, level, condition)
        loss = functional.binary_cross_entropy_with_logits(logit, share)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.average.update(self.guide.network)
        return {"value/loss": loss.detach()}

    def _rewarded(self, n: int) -> tuple[Tensor, Condition, Tensor]:
        """Draws of the prior, conditions of each, and r^beta of these over its bound, at most 1."""
        generator = self.generator
        times = 1 if self.guide.encode is None else self.settings.conditions
        index = torch.randint(len(self.draws), (n,), generator=generator, device=generator.device)
        condition, _ = self.task.draw_conditions(n * times, generator=generator)
        x0 = self.draws[index]
        each = x0.repeat_interleave(times, 0)
        log_reward = self.beta * score(self.task, each, condition)[0]
        return x0, condition, (log_reward - self.guide.log_bound).exp().clamp(max=1)

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold."""
        return {
            "network": self.guide.network,
            "average": self.average,
            "optimiser": self.optimiser,
            "generator": GeneratorState(self.generator),
        }
