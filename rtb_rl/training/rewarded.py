"""A posterior's denoiser by regression on rewarded draws of the prior, before any path of its own.

The denoiser of prior * r^beta / Z is E[w x_0 | x_k] / E[w | x_k] with w = r(x_0)^beta / Z. For D,
the prior's, and any b that depends on x_k alone it is also

    D(x_k) + E[(w - b) (x_0 - D) | x_k] / E[w | x_k]

since E[x_0 - D | x_k] = 0. As b = r(D(x_k))^beta / Z takes what x_k already says of the reward out
of the noise, levels at which it says all are left where they are. The weights of levels move no
minimiser. By the divergence of paths, c^2 / (2 s^2) a squared error (c: what x_0 counts in a step,
s: its spread), nearly all noise would come from the last few levels, where little is to be learned;
by 1 / n, n = E|x_0 - D|^2, to which the noise is proportional, a third would come from the first
levels, where next to nothing is decided. A level's weight is the geometric mean of the two.

The draws are noised, so this is exact where the prior's chain reverses the noising; trajectory
balance over paths comes after it. The reward needs no gradient. A posterior that can leave its last
steps to the prior (PriorInLastSteps) does so where next to nothing of the reward is open.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import GaussianDiffusion, PriorInLastSteps, conditions
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.ema import Average, TrainedState
from rtb_rl.training.pretrain import random_level
from rtb_rl.training.rates import cosine
from rtb_rl.training.rewarded_draws import RewardedDraws, coupled_choice
from rtb_rl.training.scoring import score
from rtb_rl.training.seeding import GeneratorState
from rtb_rl.training.settings import check_beta, check_settings
from rtb_rl.training.task import Task, trainable

PROBES = 128
"""Draws that measure the noise of a level."""
OPEN_PROBES = 2048
"""Draws, if there are as many, that tell what of the reward is open at a level."""


@dataclass(frozen=True)
class RewardedSettings:
    """How a posterior learns from rewarded draws of the prior."""

    draws: int = 10_000
    """In all."""
    steps: int = 1000
    batch: int = 128
    conditions: int = 10
    """For each draw, at most; one of them is learned from, chosen by its weight."""
    learning_rate: float = 3e-4
    """Falls to zero along a cosine, after `warmup` steps of rising to it."""
    warmup: int = 100
    input_rate: float = 30.0
    """Rate of inputs that the prior's network lacks, as a multiple: these start at zero."""
    gradient_clip: float = 10.0
    average_decay: float = 0.99
    open_limit: float = 0.05
    """The last steps stay the prior's as far as less than so many nats of the reward are open
    there, on average under the target; 0: no step does."""


@dataclass(frozen=True)
class _Drawn:
    """Noised draws x [n, *event] of the prior, its predictions and their errors, the rows chosen by
    weight and by guess, the means of both, and by what a draw counts in a mean.
    """

    x: Tensor
    level: Tensor
    before: Tensor
    error: Tensor
    kept: Tensor
    guessed: Tensor
    weight: Tensor
    guess: Tensor
    correction: Tensor


class RewardedTrainer:
    """Moves `task.posterior` from the prior to the denoiser of the target; `average.module` is the
    result.

    With u = posterior - D, v = x_0 - D, c chosen among the rows of a draw in proportion to w and c'
    in proportion to b, W and B their means over the rows, and a_k the weight of level k the loss is
    K a_k (W (|u_c|^2 / 2 - u_c . v) + B u_c' . v), K the number of levels learned. InputError for
    another diffusion than GaussianDiffusion, a beta that is no positive number, settings out of
    their range, and a posterior without a parameter to train.
    """

    name = "start"

    def __init__(
        self,
        task: Task,
        draws: RewardedDraws,
        beta: float,
        settings: RewardedSettings,
        *,
        new_inputs: Iterable[nn.Parameter] = (),
        generator: Generator,
    ):
        if not isinstance(task.diffusion, GaussianDiffusion):
            raise InputError(
                "a start from rewarded draws needs a GaussianDiffusion, not"
                f" {type(task.diffusion).__name__}; leave out the start, or the learned law of the"
                " first noise"
            )
        check_beta(beta)
        check_settings(settings)
        self.task, self.draws, self.beta, self.settings = task, draws, beta, settings
        self.generator, self.diffusion = generator, task.diffusion
        # One bound for all guesses: that of a batch would tell them of the batch's own x_0.
        self.most = float(draws.log_weight.max())
        self.trained = trainable(task)
        self.average = Average(task.posterior, settings.average_decay)
        fresh = {id(p) for p in new_inputs}
        groups = [
            {"params": [p for p in self.trained if (id(p) in fresh) == is_new], "times": times}
            for is_new, times in ((False, 1.0), (True, settings.input_rate))
        ]
        self.optimiser = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            settings.learning_rate,
            weight_decay=0.0,
            fused=True,
        )
        settled = 0
        if isinstance(task.posterior, PriorInLastSteps):
            settled = self._settled_steps()
        for acting in (task.posterior, self.average.module):
            if isinstance(acting, PriorInLastSteps):
                acting.steps.fill_(settled)
        self.first = settled + 1
        self.level_weight = self._level_weight()

    def update(self, step: int) -> Mapping[str, Tensor]:
        """One gradient step."""
        settings = self.settings
        rate = cosine(settings.learning_rate, step, settings.steps)
        rate *= min(1.0, (step + 1) / max(settings.warmup, 1))
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["times"]
        loss = self.loss(settings.batch)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, settings.gradient_clip)
        self.optimiser.step()
        self.average.update(self.task.posterior)
        return {"start/loss": loss.detach(), "start/gradient_norm": norm}

    def loss(self, n: int) -> Tensor:
        """Of `n` draws at random levels; a scalar with graph."""
        learned = self.diffusion.levels - self.first + 1
        level = self.first - 1 + random_level(n, learned, generator=self.generator)
        drawn = self._draw(level)
        moved, gain, guessed_gain = self._moved(drawn)
        each = drawn.weight * (moved / 2 - gain) + drawn.guess * guessed_gain
        return learned * (self.level_weight[level] * drawn.correction * each).mean()

    @torch.no_grad()
    def _draw(self, level: Tensor) -> "_Drawn":
        """Draws of the prior at these levels, with what they weigh and are guessed to."""
        generator, task = self.generator, self.task
        given = (len(level), self.settings.conditions)
        x0, rows, log_weight, correction = self.draws.sample(*given, generator=generator)
        x = self.diffusion.corrupt(x0, level, generator=generator)
        before = task.prior(x, level, self._condition(rows[:, 0]))
        log_guess = self._log_guess(before, rows).clamp(max=self.most)
        laws = (log_weight.softmax(1), log_guess.softmax(1))
        kept, guessed = (
            rows.gather(1, chosen[:, None])[:, 0]
            for chosen in coupled_choice(*laws, generator=generator)
        )
        weight, guess = log_weight.exp().mean(1), log_guess.exp().mean(1)
        return _Drawn(x, level, before, x0 - before, kept, guessed, weight, guess, correction)

    def _moved(self, drawn: "_Drawn") -> tuple[Tensor, Tensor, Tensor]:
        """|u|^2 and u . error for the rows `kept`, u . error for the rows `guessed`: [n] each. The
        network is asked again only where the two differ.
        """
        n, other = len(drawn.x), (drawn.kept != drawn.guessed).nonzero()[:, 0]
        both = torch.cat([torch.arange(n, device=other.device), other])
        condition = self._condition(torch.cat([drawn.kept, drawn.guessed[other]]))
        after = self.task.posterior(drawn.x[both], drawn.level[both], condition)
        shift = (after - drawn.before[both]).flatten(1)
        gain = (shift * drawn.error[both].flatten(1)).sum(1)
        return shift[:n].square().sum(1), gain[:n], gain[:n].index_put((other,), gain[n:])

    @torch.no_grad()
    def _log_guess(self, prediction: Tensor, rows: Tensor) -> Tensor:
        """beta log r - log Z of the prior's predictions for some rows of each: [n, m]."""
        times = rows.shape[1]
        repeated = prediction.repeat_interleave(times, 0)
        found = score(self.task, repeated, self._condition(rows.flatten()))[0]
        return self.beta * found.reshape(rows.shape) - self.draws.log_z[rows]

    def _settled_steps(self) -> int:
        """How many steps from the end have less than `open_limit` open; all but one at most."""
        for k in range(1, self.diffusion.levels):
            if self._open(k) >= self.settings.open_limit:
                return k - 1
        return self.diffusion.levels - 1

    @torch.no_grad()
    def _open(self, k: int) -> float:
        """E_w |beta log r(x_0) - beta log r(D(x_k))| over draws weighted by w: nats."""
        off, total, times = 0.0, 0.0, self.settings.conditions
        for n in torch.arange(min(OPEN_PROBES, len(self.draws.x0))).split(self.settings.batch):
            x0, rows, log_weight, correction = self.draws.sample(
                len(n), times, generator=self.generator
            )
            level = torch.full((len(x0),), k, device=x0.device)
            x = self.diffusion.corrupt(x0, level, generator=self.generator)
            before = self.task.prior(x, level, self._condition(rows[:, 0]))
            weight = correction[:, None] * log_weight.double().exp()
            off += float((weight * (log_weight - self._log_guess(before, rows)).abs()).sum())
            total += float(weight.sum())
        return off / total if total > 0 else math.inf

    def _level_weight(self) -> Tensor:
        """sqrt(g / n) a level, [K + 1], over the mean of sqrt(g n) over the levels learned; n is
        E|x_0 - D|^2 and g what a squared error of the prediction costs the paths, nats.

        g n is at most half the number of coordinates, as it is where all of a step's spread comes
        from x_0: one with a declared floor would outweigh all others.
        """
        levels = torch.arange(self.first, self.diffusion.levels + 1)
        noise = torch.stack([self._noise(int(k)) for k in levels])
        per_step = self.diffusion.weight_x0[levels] / self.diffusion.std[levels]
        price = per_step.square().flatten(1).mean(1).to(noise) / 2
        nats = (price * noise).clamp(max=math.prod(self.diffusion.event_shape) / 2).sqrt()
        unlearned = torch.zeros(self.first, dtype=noise.dtype, device=noise.device)
        return torch.cat([unlearned, nats / noise / nats.mean()])

    def _noise(self, level: int) -> Tensor:
        """E|x_0 - D(x_k)|^2 at a level; a scalar."""
        drawn = self._draw(torch.full((PROBES,), level, device=self.generator.device))
        return (drawn.correction * drawn.error.flatten(1).square().sum(1)).mean()

    def _condition(self, rows: Tensor) -> Condition:
        return conditions.take(self.draws.condition, rows)

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold."""
        return {
            "posterior": TrainedState(self.task.posterior),
            "average": self.average,
            "optimiser": self.optimiser,
            "generator": GeneratorState(self.generator),
        }
