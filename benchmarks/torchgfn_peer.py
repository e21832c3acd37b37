# pyright: reportMissingImports=false
"""Relative trajectory balance on the 25 -> 9 Gaussian mixtures, done by torchgfn 2.4.1.

    PYTHON benchmarks/torchgfn_peer.py --out runs/peer.jsonl --seed 0

PYTHON belongs to an environment of its own (pip install torch==2.13.0 torchgfn==2.4.1 matplotlib
scipy), because torchgfn keeps numpy below 2; so nothing of rtb_rl is imported. A prior is fitted to
25 equal modes by maximum likelihood, then fine-tuned to 9 modes. The budgets are wall-clock seconds
and leave evaluation out; on a busy machine compare the processor's seconds, which are given too.
OMP_NUM_THREADS sets the threads.

The example of torchgfn fits the prior along bridges with noise sigma and then samples with sigma
sqrt(t_scale), so that its best prior is far from the 25 modes. `--sigma 2.236 --t-scale 1` is the
published toy (arXiv 2405.20971), where both agree.

The file gets one JSON object a line. `prior`: shares by nearest mode of 100,000 draws, and by their
rewards the exact posterior of *this* prior. `evaluation`: 10,000 draws; `tv` is the total variation
between their shares by nearest mode and the ideal ones, `tv_own_prior` that to the shares of the
prior's exact posterior. Drawing 10,000 times from the target itself gives about 0.01. `end`: the
settings and the versions.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from gfn.estimators import PinnedBrownianMotionForward
from gfn.gflownet import RelativeTrajectoryBalanceGFlowNet
from gfn.gflownet.mle import MLEDiffusion
from gfn.gym.diffusion_sampling import DiffusionSampling
from gfn.samplers import Sampler
from gfn.utils.modules import DiffusionPISGradNetForward
from torch import Tensor

COORDINATES = (-10.0, -5.0, 0.0, 5.0, 10.0)
MEANS = torch.cartesian_prod(torch.tensor(COORDINATES), torch.tensor(COORDINATES))
VARIANCE = 0.3
MODES_X, MODES_Y = (-10, -5, -5, 10, 0, 0, 5, 5, 5), (-5, -10, 0, -5, 0, 5, -5, 0, 10)
WEIGHTS = dict(zip(zip(MODES_X, MODES_Y), (4, 10, 4, 5, 10, 5, 4, 15, 4)))
IDEAL = torch.tensor([WEIGHTS.get((int(x), int(y)), 0) / 61 for x, y in MEANS])

CHUNK = 10_000  # draws at once
PRIOR_CHUNKS = 10

SOURCE = (
    "the defaults of torchgfn's tutorials/examples/train_diffusion_rtb.py; widths and depth of the "
    "network: the defaults of DiffusionPISGradNetForward, which are the example's too; the loss: "
    "the default of RelativeTrajectoryBalanceGFlowNet (half the square); ours: the budgets in "
    "seconds, the debug checks off, and sigma and t_scale where the options differ from 2 and 5"
)


@dataclass(frozen=True)
class Recipe:
    """The settings of torchgfn's own example."""

    levels: int = 100
    sigma: float = 2.0
    t_scale: float = 5.0
    batch: int = 500
    learning_rate: float = 1e-3
    """Adam's, of the prior and of the posterior."""
    log_z_learning_rate: float = 0.1
    beta: float = 1.0
    exploration: float = 0.5
    """Standard deviation of noise that is added in each step of a trajectory to train on."""
    exploration_constant: int = 500
    """Iterations before it shrinks, to the share left of exploration_end."""
    exploration_end: int = 4500
    prior_iterations: int = 10_000
    iterations: int = 5_000

    def exploration_at(self, iteration: int) -> float:
        if iteration < self.exploration_constant:
            return self.exploration
        return self.exploration * max(0.0, 1 - iteration / self.exploration_end)

    def process(self) -> PinnedBrownianMotionForward:
        """A pinned Brownian motion with a new network for its drift."""
        network = DiffusionPISGradNetForward(s_dim=2, zero_init=True, t_scale=self.t_scale)
        return PinnedBrownianMotionForward(2, network, self.sigma, self.levels)

    def environment(self, target: str) -> DiffusionSampling:
        return DiffusionSampling(target, None, self.levels)


@dataclass
class Progress:
    """Iterations done, and the seconds they took by the clock and of the processor."""

    iterations: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def within(self, seconds: float, iterations: int) -> Iterator[int]:
        """Numbers of iterations until a budget is spent; the loop's body is what is timed."""
        while self.seconds < seconds and self.iterations < iterations:
            start, cpu_start = time.perf_counter(), time.process_time()
            yield self.iterations
            self.seconds += time.perf_counter() - start
            self.cpu_seconds += time.process_time() - cpu_start
            self.iterations += 1

    def fields(self) -> dict[str, float]:
        milliseconds = 1000 * self.cpu_seconds / max(1, self.iterations)
        return asdict(self) | {"cpu_milliseconds_per_iteration": milliseconds}


def fit_prior(recipe: Recipe, seconds: float) -> tuple[PinnedBrownianMotionForward, Progress]:
    """Maximum likelihood along bridges from the origin to draws of the 25 modes."""
    process, environment = recipe.process(), recipe.environment("gmm25_prior")
    likelihood = MLEDiffusion(
        process, num_steps=recipe.levels, sigma=recipe.sigma, t_scale=recipe.t_scale
    )
    optimizer = torch.optim.Adam(process.parameters(), lr=recipe.learning_rate)
    progress = Progress()
    for _ in progress.within(seconds, recipe.prior_iterations):
        loss = likelihood.loss(environment, environment.target.sample(recipe.batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return process.requires_grad_(False), progress


class Finetuning:
    """A copy of the prior under relative trajectory balance, with its progress."""

    def __init__(self, recipe: Recipe, prior: PinnedBrownianMotionForward):
        self.recipe, self.progress = recipe, Progress()
        self.environment = recipe.environment("gmm25_posterior9")
        self.posterior = recipe.process()
        self.posterior.load_state_dict(prior.state_dict())
        self.balance = RelativeTrajectoryBalanceGFlowNet(
            pf=self.posterior, prior_pf=prior, beta=recipe.beta
        )
        groups: list[dict[str, Any]] = [
            {"params": self.posterior.parameters(), "lr": recipe.learning_rate},
            {"params": self.balance.logz_parameters(), "lr": recipe.log_z_learning_rate},
        ]
        self.optimizer = torch.optim.Adam(groups)

    def train_until(self, seconds: float) -> None:
        sampler = Sampler(self.posterior)
        for iteration in self.progress.within(seconds, self.recipe.iterations):
            trajectories = sampler.sample_trajectories(
                self.environment,
                n=self.recipe.batch,
                exploration_std=torch.tensor(self.recipe.exploration_at(iteration)),
            )
            loss = self.balance.loss(self.environment, trajectories)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    @property
    def finished(self) -> bool:
        return self.progress.iterations >= self.recipe.iterations


@torch.no_grad()
def draw(process: PinnedBrownianMotionForward, environment: DiffusionSampling) -> Tensor:
    """CHUNK ends of trajectories, [CHUNK, 2]."""
    trajectories = Sampler(process).sample_trajectories(environment, n=CHUNK)
    return trajectories.terminating_states.tensor[:, :2]


def total_variation(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().sum() / 2)


def summarise(points: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Shares by nearest mode [25]; weight beyond 3 sigma of each mode (ideally 0.011), variance.

    `points` [n, 2] have `weights` [n] of sum 1. The variance is the mean over both coordinates of
    the squared distance to the nearest mode's mean, as a ratio to the exact one.
    """
    distance, nearest = torch.cdist(points, MEANS).min(dim=1)
    shares = torch.zeros(len(MEANS)).index_add(0, nearest, weights)
    outside = weights[distance > 3 * VARIANCE**0.5].sum()
    variance_ratio = (weights * distance.square()).sum() / (2 * VARIANCE)
    return shares, {"outside": float(outside), "variance_ratio": float(variance_ratio)}


def equal(points: Tensor) -> Tensor:
    return torch.full((len(points),), 1 / len(points))


def prior_report(
    prior: PinnedBrownianMotionForward, environment: DiffusionSampling
) -> tuple[Tensor, dict[str, Any]]:
    """Shares of the exact posterior of this prior [25]; how far prior and posterior are off."""
    points = torch.cat([draw(prior, environment) for _ in range(PRIOR_CHUNKS)])
    rewards = environment.target.log_reward(points).exp()
    weights = rewards / rewards.sum()
    shares, shape = summarise(points, equal(points))
    own, own_shape = summarise(points, weights)
    return own, {
        "tv": total_variation(shares, torch.full((len(MEANS),), 1 / len(MEANS))),
        **shape,
        "log_z": float(rewards.mean().log()),
        "effective_share": float(1 / weights.square().sum() / len(weights)),
        "own_posterior": {"tv": total_variation(own, IDEAL), **own_shape},
    }


def evaluation(finetuning: Finetuning, own: Tensor) -> dict[str, Any]:
    points = draw(finetuning.posterior, finetuning.environment)
    shares, shape = summarise(points, equal(points))
    distances = {"tv": total_variation(shares, IDEAL), "tv_own_prior": total_variation(shares, own)}
    log_z = float(finetuning.balance.logZ.detach())
    return {**finetuning.progress.fields(), **distances, **shape, "log_z": log_z}


def write(file: TextIO, event: str, fields: dict[str, Any]) -> None:
    file.write(json.dumps({"event": event, **fields}) + "\n")
    file.flush()


def run(options: argparse.Namespace, file: TextIO) -> None:
    torch.manual_seed(options.seed)
    recipe = Recipe(sigma=options.sigma, t_scale=options.t_scale)
    prior, progress = fit_prior(recipe, options.prior_seconds)
    finetuning = Finetuning(recipe, prior)
    own, report = prior_report(prior, finetuning.environment)
    write(file, "prior", {**progress.fields(), **report})
    goal = 0.0
    while goal < options.seconds and not finetuning.finished:
        write(file, "evaluation", evaluation(finetuning, own))
        goal = min(goal + options.evaluate_every, options.seconds)
        finetuning.train_until(goal)
    write(file, "evaluation", evaluation(finetuning, own))
    packages = {name: version(name) for name in ("torchgfn", "torch", "numpy")}
    machine = {"threads": torch.get_num_threads(), "versions": packages}
    settings = {"settings": asdict(recipe), "settings_from": SOURCE}
    write(file, "end", {"options": vars(options), **machine, **settings})


def main() -> None:
    parser = argparse.ArgumentParser(description="25 -> 9 Gaussian mixtures with torchgfn")
    parser.add_argument("--out", required=True, help="file of JSON lines to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=300, help="of fine-tuning")
    parser.add_argument("--prior-seconds", type=float, default=600, help="of fitting the prior")
    parser.add_argument("--evaluate-every", type=float, default=30, help="seconds of fine-tuning")
    parser.add_argument("--sigma", type=float, default=Recipe.sigma)
    parser.add_argument("--t-scale", type=float, default=Recipe.t_scale)
    options = parser.parse_args()
    with Path(options.out).open("w", encoding="utf-8") as file:
        run(options, file)


if __name__ == "__main__":
    main()
