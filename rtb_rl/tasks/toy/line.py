"""Three modes on the real line, tilted towards one of them, and chains propagated on a grid.

Probabilities of the grid points [G] stand for densities, so that the law at the end of a trained
chain is computed and not sampled. float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rtb_rl.core import (
    Denoiser,
    GaussianDiffusion,
    Sampler,
    Schedule,
    log_snr_schedule,
    zero_terminal_signal,
)
from rtb_rl.core.gaussian import large_spread, small_spread
from rtb_rl.tasks.toy.answer import Toy
from rtb_rl.tasks.toy.enumeration import tilted, total_variation
from rtb_rl.tasks.toy.mixture import GaussianMixture, MixtureDenoiser
from rtb_rl.tasks.toy.posterior import PosteriorMaker
from rtb_rl.training.task import Task

GRID_END, GRID_POINTS = 5.5, 321

Spread = Callable[[Schedule, GaussianMixture], Tensor]
"""The spread of each step of a chain for that data: [K]."""


@dataclass(frozen=True)
class LineChain:
    """p(x[k-1] | x[k]) = N(mean, std^2) at each grid point; x[K] ~ N(0, 1).

    `grid` [G], evenly spaced; `mean`, `std` [K, G], row k - 1 for the step from level k. The
    smallest spread should be no less than half the distance of grid points.
    """

    grid: Tensor
    mean: Tensor
    std: Tensor

    @property
    def levels(self) -> int:
        return len(self.mean)

    def start(self) -> Tensor:
        """The law of x[K]: [G]."""
        return (self.grid.square() / -2).softmax(0)

    def step(self, level: int) -> Tensor:
        """Probabilities of the step from `level`, from grid point to grid point: [G, G]."""
        mean, std = self.mean[level - 1, :, None], self.std[level - 1, :, None]
        return (((self.grid - mean) / std).square() / -2).softmax(1)

    def terminal(self) -> Tensor:
        """The law of x[0]: [G]."""
        law = self.start()
        for level in range(self.levels, 0, -1):
            law = law @ self.step(level)
        return law


@torch.no_grad()
def line_chain(diffusion: GaussianDiffusion, denoiser: Denoiser, grid: Tensor) -> LineChain:
    """The chain of a one-dimensional denoiser, read off its kernels at the grid points [G]."""
    x, means, stds = grid[:, None].to(diffusion.dtype), [], []
    for k in range(1, diffusion.levels + 1):
        level = torch.full((len(grid),), k)
        kernel = diffusion.kernel(denoiser(x, level, None), x, level)
        means.append(kernel.mean[:, 0].double())
        stds.append(kernel.std.expand_as(kernel.mean)[:, 0].double())
    return LineChain(grid, torch.stack(means), torch.stack(stds))


def terminal_density(diffusion: GaussianDiffusion, denoiser: Denoiser, grid: Tensor) -> Tensor:
    """The exact law of x[0], up to the grid, as probabilities of its points: [G]."""
    return line_chain(diffusion, denoiser, grid).terminal()


def three_modes_mixture() -> GaussianMixture:
    """N(-1.2, 0.25^2), N(0, 0.25^2), N(1.2, 0.25^2) in equal parts; of variance about 1."""
    means = torch.tensor([[-1.2], [0.0], [1.2]], dtype=torch.float64)
    return GaussianMixture(torch.full((3,), 1 / 3), means, torch.full((3, 1, 1), 0.25**2))


def middle_class(x: Tensor, *, slope: float = 6.0, floor: float = 0.05) -> Tensor:
    """log of the probability that x [*batch] is of the class |x| < 0.6, between `floor` and 1."""
    inside = (slope * (x + 0.6)).sigmoid() * (slope * (0.6 - x)).sigmoid()
    return (floor + (1 - floor) * inside).log()


def even_grid() -> Tensor:
    return torch.linspace(-GRID_END, GRID_END, GRID_POINTS, dtype=torch.float64)


def small_steps(schedule: Schedule, mixture: GaussianMixture) -> Tensor:
    """`small_spread`, at least 0.05."""
    return small_spread(schedule, floor=0.05)


def large_steps(schedule: Schedule, mixture: GaussianMixture) -> Tensor:
    """`large_spread`."""
    return large_spread(schedule)


def calibrated_steps(schedule: Schedule, mixture: GaussianMixture) -> Tensor:
    """What `calibrated_spread` estimates from data, computed on the grid.

    E|x_0 - D(x_k)|^2 = E x_0^2 - E D(x_k)^2 under the data and its noised law.
    """
    diffusion = GaussianDiffusion(schedule, (1,), large_spread(schedule))
    denoiser, grid = mixture.denoiser(schedule), even_grid()
    data = mixture.log_prob(grid[:, None]).softmax(0)
    rows = []
    for k in range(1, schedule.levels + 1):
        signal, noise = schedule.signal[k], schedule.noise[k]
        noised = GaussianMixture(
            mixture.weights,
            signal * mixture.means,
            signal.square() * mixture.covariances + noise.square(),
        )
        predicted = denoiser(grid[:, None], torch.full((len(grid),), k), None)[:, 0]
        law = noised.log_prob(grid[:, None]).softmax(0)
        error = data @ grid.square() - law @ predicted.square()
        rows.append(diffusion.weight_x0[k].square().squeeze() * error)
    return (torch.stack(rows) + small_spread(schedule, floor=1e-3).square()).sqrt()


def three_modes_chain(
    levels: int, spread: Spread, dtype: torch.dtype
) -> tuple[GaussianDiffusion, MixtureDenoiser]:
    """A chain for `three_modes_mixture`, and its exact denoiser.

    Even steps of log signal-to-noise ratio, no signal at level K: the law of a few steps is about
    twice as near to the data as with `vp_schedule`.
    """
    mixture = three_modes_mixture()
    schedule = zero_terminal_signal(log_snr_schedule(levels, first_noise=0.15))
    diffusion = GaussianDiffusion(schedule, (1,), spread(schedule, mixture), dtype=dtype)
    return diffusion, mixture.denoiser(schedule)


def three_modes(
    levels: int,
    *,
    spread: Spread = calibrated_steps,
    posterior: PosteriorMaker,
    log_reward: Callable[[Tensor], Tensor] = middle_class,
) -> Toy:
    """`three_modes_mixture` with its exact denoiser, tilted by a soft class reward of x.

    The target is the tilted law of the chain itself, whose steps are too few to have the law of the
    data. `task.evaluate`: "tv" to it, propagated on a grid without sampling. `errors`: the largest
    difference of the distribution functions, "kolmogorov", which n draws leave at about n^-1/2.
    """
    mixture, grid = three_modes_mixture(), even_grid()
    diffusion, prior = three_modes_chain(levels, spread, torch.float32)
    chain = terminal_density(diffusion, prior, grid)
    target = tilted(chain, log_reward(grid))

    def evaluate(sampler: Sampler) -> dict[str, float]:
        law = terminal_density(diffusion, sampler.denoiser, grid)
        return {"tv": total_variation(law, target)}

    def draw_conditions(n: int, *, generator: Generator) -> tuple[None, Tensor]:
        return None, mixture.sample(n, generator=generator).float()

    task = Task(
        name="three_modes",
        diffusion=diffusion,
        prior=prior,
        posterior=posterior(prior, diffusion, 0),
        log_reward=lambda x0, condition: log_reward(x0[:, 0]),
        draw_conditions=draw_conditions,
        evaluate=evaluate,
        draw_target=lambda condition, n, *, generator: _draw(target, grid, n, generator=generator),
    )
    return Toy(
        task,
        log_z=lambda condition: (chain.log() + log_reward(grid)).logsumexp(0).reshape(1),
        errors=lambda x0, condition: {"kolmogorov": kolmogorov_distance(x0, target, grid)},
    )


def kolmogorov_distance(draws: Tensor, law: Tensor, grid: Tensor) -> float:
    """The largest difference of distribution functions between draws and a law on the grid."""
    ordered = draws.flatten().double().sort().values
    share = torch.searchsorted(ordered, grid + (grid[1] - grid[0]) / 2) / len(ordered)
    return float((share - law.cumsum(0)).abs().max())


def _draw(law: Tensor, grid: Tensor, n: int, *, generator: Generator) -> Tensor:
    """Draws spread evenly around the grid points: float32 [n, 1]."""
    index = law.multinomial(n, True, generator=generator)
    within = torch.rand(n, generator=generator, dtype=torch.float64) - 0.5
    return (grid[index] + within * (grid[1] - grid[0]))[:, None].float()
