"""Sequential Monte Carlo over the prior's chain: particles are weighed and resampled on the way.

Both methods sample prior * r^beta / Z of the same chain in the limit of many particles, and their
estimate of Z is unbiased at any number. Weights stay logarithms, and are carried on where a
population is not resampled.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from rtb_rl.baselines.draws import CountedDenoiser, Draws, as_rows, check_count, tempered
from rtb_rl.baselines.guidance import look_ahead_in_batches, point_likelihood
from rtb_rl.core import (
    Denoiser,
    Diffusion,
    GaussianDiffusion,
    GaussianKernel,
    LogReward,
    ScaledPrediction,
    conditions,
    effective_sample_size,
    systematic_resampling,
)
from rtb_rl.core.kernels import exponential_race
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError

Potential = Callable[[Tensor], Tensor]
"""Estimates of beta log r at the levels seen so far [seen, batch], the latest last -> log of the
potential, nats: [batch].
"""


def difference_potential(estimates: Tensor) -> Tensor:
    """The estimate's gain since the last one: all weights so far make up the latest estimate."""
    return estimates[-1] - estimates[-2] if len(estimates) > 1 else estimates[-1]


def max_potential(estimates: Tensor) -> Tensor:
    """The largest estimate so far; favours particles that were promising at some level."""
    return estimates.amax(0)


def sum_potential(estimates: Tensor) -> Tensor:
    """The sum of the estimates so far."""
    return estimates.sum(0)


class CleanEstimate(Protocol):
    """Clean points that a prediction at x stands for: [draws, batch, *event]."""

    def __call__(self, prediction: Any, x: Tensor, *, generator: Generator) -> Tensor: ...


def predicted_mean(
    prediction: Tensor | ScaledPrediction, x: Tensor, *, generator: Generator
) -> Tensor:
    """The predicted x0 of a Gaussian diffusion: one estimate, [1, batch, *event]."""
    x0 = prediction.x0 if isinstance(prediction, ScaledPrediction) else prediction
    return x0.unsqueeze(0)


def drawn_tokens(mask: int, draws: int = 4) -> CleanEstimate:
    """For masked diffusion: every masked position filled in from its own law, `draws` times."""

    def estimate(prediction: Any, x: Tensor, *, generator: Generator) -> Tensor:
        log_probs = prediction[0] if isinstance(prediction, tuple) else prediction
        each = log_probs.expand(draws, *log_probs.shape).flatten(0, -2)
        tokens = exponential_race(each, generator=generator).reshape(draws, *x.shape)
        return torch.where(x == mask, tokens, x)

    return estimate


@dataclass(frozen=True)
class Move:
    """A prediction at x, and where particles move along one, a gradient [batch, *event]."""

    prediction: Any
    gradient: Tensor | None = None

    def take(self, index: Tensor) -> "Move":
        """The rows at `index`."""
        parts = self.prediction
        scaled = isinstance(parts, tuple)
        prediction = type(parts)(*(part[index] for part in parts)) if scaled else parts[index]
        return Move(prediction, None if self.gradient is None else self.gradient[index])

    def proposal(self, kernel: Any) -> Any:
        """The law that particles move by: the prior's kernel, shifted by std^2 * gradient."""
        if self.gradient is None:
            return kernel
        return GaussianKernel(kernel.mean + kernel.std.square() * self.gradient, kernel.std)


Look = Callable[[Tensor, Tensor, Condition], tuple[Move, Tensor]]
"""(x, level, condition) -> how particles move on, and the estimate of beta log r, nats: [batch]."""


def twisted_smc(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    log_reward: LogReward,
    condition: Condition,
    n: int,
    *,
    beta: float = 1.0,
    particles: int = 4,
    ess_threshold: float = 0.5,
    generator: Generator,
) -> Draws:
    """Twisted diffusion sampler: particles follow r^beta at the predicted x0 and its gradient.

    Twist r(x0 predicted at x_k)^beta, proposal N(mean + std^2 grad log twist, std^2), weight
    prior / proposal * twist[k-1] / twist[k]; the last twist is r^beta itself (arXiv 2306.17775,
    algorithm 1). `log_reward` must be differentiable. 3 K calls a draw. Populations and resampling
    as in `fk_steering`.
    """
    counted, likelihood = CountedDenoiser(denoiser), point_likelihood(log_reward, beta)

    def look(x: Tensor, level: Tensor, condition: Condition) -> tuple[Move, Tensor]:
        guidance = look_ahead_in_batches(counted, likelihood, x, level, condition)
        return Move(guidance.prediction, guidance.gradient), guidance.log_likelihood.double()

    levels = range(1, diffusion.levels + 1)
    swarm = _Swarm(diffusion, counted, look, difference_potential, levels, particles, ess_threshold)
    return swarm.draws(tempered(log_reward, beta), condition, n, generator=generator)


def fk_steering(
    diffusion: Diffusion,
    denoiser: Denoiser,
    log_reward: LogReward,
    condition: Condition,
    n: int,
    *,
    beta: float = 1.0,
    particles: int = 4,
    potential: Potential = difference_potential,
    levels: Collection[int] | None = None,
    clean: CleanEstimate = predicted_mean,
    ess_threshold: float = 0.5,
    generator: Generator,
) -> Draws:
    """Feynman-Kac steering: particles move by the prior and are weighed by potentials of log r at
    the predicted x0 (arXiv 2501.06848); no gradients.

    The potentials act at `levels` (all of 1..K by default; `max_potential` and `sum_potential` add
    up and want few), and the last weight makes up the difference to r^beta. `clean` says what a
    prediction stands for; of several points the mean of r^beta counts. A row runs n / particles
    populations; one is resampled where its effective sample size falls below `ess_threshold` *
    particles (0: never, 1: always), and delivers `particles` draws by its last weights. A particle
    whose estimate is minus infinity dies, and with it the possible ends that it had: then log Z is
    too low. K calls a draw. InputError where `n` is no multiple of `particles`.
    """
    counted, reward = CountedDenoiser(denoiser), tempered(log_reward, beta)

    def look(x: Tensor, level: Tensor, condition: Condition) -> tuple[Move, Tensor]:
        prediction = counted(x, level, condition)
        values = [reward(x0, condition) for x0 in clean(prediction, x, generator=generator)]
        estimate = torch.stack(values).double().logsumexp(0) - math.log(len(values))
        return Move(prediction), estimate

    levels = range(1, diffusion.levels + 1) if levels is None else levels
    swarm = _Swarm(diffusion, counted, look, potential, levels, particles, ess_threshold)
    return swarm.draws(reward, condition, n, generator=generator)


@dataclass(frozen=True)
class _Swarm:
    """The particle filter: `look` says how particles move, `potential` how they are weighed."""

    diffusion: Diffusion
    denoiser: CountedDenoiser
    look: Look
    potential: Potential
    levels: Collection[int]
    particles: int
    threshold: float

    def __post_init__(self):
        check_count("particles", self.particles)
        if not 0 <= self.threshold <= 1:
            raise InputError(f"ess_threshold is {self.threshold}; give a share from 0 to 1")
        if unknown := sorted(set(self.levels) - set(range(1, self.diffusion.levels + 1))):
            raise InputError(
                f"there is no level {unknown[0]} in a diffusion of {self.diffusion.levels}; give"
                f" some of 1 to {self.diffusion.levels}"
            )

    @torch.no_grad()
    def draws(
        self, reward: LogReward, condition: Condition, n: int, *, generator: Generator
    ) -> Draws:
        """Final points by their weights, and what the weights say; `reward` is beta log r."""
        if n % self.particles:
            raise InputError(
                f"{n} draws can't be made by populations of {self.particles} particles; ask for a"
                " multiple, or change particles"
            )
        rows = conditions.count(condition) or 1
        x, log_weight = self._run(reward, conditions.repeat(condition, n), n * rows, generator)
        by_population = log_weight.reshape(-1, self.particles)
        index = systematic_resampling(by_population.softmax(1), self.particles, generator=generator)
        ess = effective_sample_size(by_population).reshape(rows, -1).mean(1)
        log_z = log_weight.reshape(rows, n).logsumexp(1) - math.log(n)
        x0 = as_rows(x[_flat(index)], condition, n)
        population = torch.arange(n, device=x.device) // self.particles
        source = population if condition is None else population.expand(rows, n)
        return Draws(x0, self.denoiser.calls / len(x), log_z, ess, source)

    def _run(
        self, reward: LogReward, each: Condition, batch: int, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """x[0] and its log-weights [batch], whose mean exponential estimates Z.

        `spent` is what the potentials have put into a particle's weight on its way.
        """
        x = self.diffusion.start(batch, generator=generator)
        log_weight = torch.zeros(batch, dtype=torch.float64, device=x.device)
        spent, seen = log_weight, log_weight.new_empty((0, batch))
        for k in range(self.diffusion.levels, 0, -1):
            level = torch.full((batch,), k, dtype=torch.int64, device=x.device)
            if k in self.levels:
                move, estimate = self.look(x, level, each)
                seen = torch.cat([seen, estimate[None]])
                gain = self.potential(seen)
                index, log_weight = self._resampled(log_weight + gain, generator)
                x, move, seen = x[index], move.take(index), seen[:, index]
                spent = (spent + gain)[index]
            else:
                move = Move(self.denoiser(x, level, each))
            kernel = self.diffusion.kernel(move.prediction, x, level)
            proposal = move.proposal(kernel)
            x = proposal.sample(generator=generator)
            log_weight = log_weight + kernel.log_ratio(proposal, x)
        return x, log_weight + reward(x, each).double() - spent

    def _resampled(self, log_weight: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Ancestors and log-weights [batch]: the mean weight for all of a resampled population,
        nothing changed for the others.
        """
        weight = log_weight.reshape(-1, self.particles)
        low = (effective_sample_size(weight) < self.threshold)[:, None]
        drawn = systematic_resampling(weight.softmax(1), self.particles, generator=generator)
        index = torch.where(low, drawn, torch.arange(self.particles, device=drawn.device))
        mean = weight.logsumexp(1, keepdim=True) - math.log(self.particles)
        return _flat(index), torch.where(low, mean, weight).flatten()


def _flat(index: Tensor) -> Tensor:
    """Indices [populations, particles] within each population, as rows of all particles."""
    populations, particles = index.shape
    first = torch.arange(populations, device=index.device)[:, None] * particles
    return (first + index).flatten()
