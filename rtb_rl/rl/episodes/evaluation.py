"""Returns of a policy over whole episodes, run side by side with one policy call per step.

Each episode is counted once, from its first step to its termination or truncation; there is no
automatic reset. A plain list of environments is stepped in turn: for MuJoCo this is as fast as
Gymnasium's SyncVectorEnv, and faster than one process for each environment.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch

from rtb_rl.errors import InputError
from rtb_rl.rl.episodes.environments import action_box, make_environment

BOUND_TOLERANCE = 1e-4  # of the width of the action box: what float32 rounding may add


class Policy(Protocol):
    """Whatever acts on observations."""

    def act(self, observations: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
        """Actions [batch, d_a] inside the environment's box for observations [batch, d_o]."""
        ...


@dataclass
class EpisodeRecords:
    """One entry for each episode, in order of the episodes' seeds."""

    returns: list[float] = field(default_factory=list)
    """Undiscounted sums of rewards."""
    lengths: list[int] = field(default_factory=list)
    """Steps."""
    terminated: list[bool] = field(default_factory=list)
    """True: the environment ended it. False: cut by the time limit."""

    def normalised_scores(self, reference: tuple[float, float]) -> list[float]:
        """100 (return - low) / (high - low) for each episode, reference = (low, high)."""
        low, high = reference
        return [100 * (value - low) / (high - low) for value in self.returns]

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % percentile-bootstrap interval of the mean return; None for a single episode."""
        return bootstrap_interval(self.returns)

    def summary(self, reference: tuple[float, float] | None = None) -> dict[str, Any]:
        """JSON-ready: every episode, means and intervals; scores are None without a reference."""
        scores = self.normalised_scores(reference) if reference else None
        return {
            "returns": self.returns,
            "lengths": self.lengths,
            "terminated": self.terminated,
            "mean_return": float(np.mean(self.returns)),
            "mean_return_interval": _listed(self.interval),
            "normalised_score": float(np.mean(scores)) if scores else None,
            "normalised_score_interval": _listed(bootstrap_interval(scores)) if scores else None,
        }


def _listed(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def bootstrap_interval(
    values: list[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile-bootstrap interval of the mean of independent values; None below two values.

    Its seed is fixed, so equal values give equal intervals. Below about ten values it is narrower
    than its level promises (by a factor of sqrt((n - 1) / n) in spread, and more).
    """
    if len(values) < 2:
        return None
    random = np.random.default_rng(seed)
    draws = random.choice(np.asarray(values, dtype=np.float64), (resamples, len(values)))
    low, high = np.quantile(draws.mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def derived_seed(*entropy: int) -> int:
    """A 32-bit seed that is a function of all the integers; negative ones are refused."""
    if min(entropy) < 0:
        raise InputError(f"seed is {min(entropy)}; seeds are integers from 0 on")
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def evaluate(
    policy: Policy,
    env_id: str,
    *,
    episodes: int,
    seed: int,
    max_environments: int = 100,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> EpisodeRecords:
    """Run the policy for that many whole episodes of the environment.

    Episode i is reset with a seed derived from (seed, i). The policy sees all environments of a
    wave of at most `max_environments` at every step, on `device`; those already over stay in the
    batch and are ignored, so an episode's noise does not depend on when the others end. It does
    depend on the number of environments in its wave. `progress` gets 1 for each episode that ends.
    """
    if episodes < 1 or max_environments < 1:
        raise InputError(
            f"evaluation got episodes={episodes} and max_environments={max_environments}; "
            "both have to be 1 or more"
        )
    records = EpisodeRecords()
    size = min(episodes, max_environments)
    environments = [make_environment(env_id) for _ in range(size)]
    try:
        for first in range(0, episodes, size):
            wave = environments[: episodes - first]
            seeds = [derived_seed(seed, 0, first + i) for i in range(len(wave))]
            generator = torch.Generator(device).manual_seed(derived_seed(seed, 1, first))
            _run_wave(policy, wave, seeds, generator, records, progress)
    finally:
        for env in environments:
            env.close()
    return records


def _run_wave(
    policy: Policy,
    environments: list[gymnasium.Env],
    seeds: list[int],
    generator: torch.Generator,
    records: EpisodeRecords,
    progress: Callable[[int], None] | None,
) -> None:
    """One episode in each environment; appends them to the records."""
    count = len(environments)
    box = action_box(environments[0])
    resets = [env.reset(seed=seed)[0] for env, seed in zip(environments, seeds, strict=True)]
    observations = np.stack(resets).astype(np.float32)
    returns, lengths, terminated = [0.0] * count, [0] * count, [False] * count
    running = list(range(count))
    while running:
        actions = policy_actions(policy, observations, generator, box)
        still_running = []
        for i in running:
            observation, reward, terminated[i], cut, _ = environments[i].step(actions[i])
            observations[i] = observation
            returns[i] += float(reward)
            lengths[i] += 1
            if not (terminated[i] or cut):
                still_running.append(i)
        if progress is not None and len(still_running) < len(running):
            progress(len(running) - len(still_running))
        running = still_running
    records.returns += returns
    records.lengths += lengths
    records.terminated += [bool(value) for value in terminated]


def policy_actions(
    policy: Policy,
    observations: np.ndarray,
    generator: torch.Generator,
    box: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """The policy's actions for observations [batch, d_o]; their shape and range are checked."""
    low, high = box
    batch = torch.tensor(observations, dtype=torch.float32, device=generator.device)
    with torch.no_grad():
        actions = policy.act(batch, generator=generator).cpu().numpy()
    expected = (len(observations), len(low))
    if actions.shape != expected:
        raise InputError(
            f"the policy returned actions of shape {actions.shape}, the environment takes "
            f"{expected}; `act` maps observations [batch, d_o] to actions [batch, d_a]"
        )
    slack = BOUND_TOLERANCE * (high - low)
    if not ((actions >= low - slack) & (actions <= high + slack)).all():
        raise InputError(
            f"the policy's actions reach from {actions.min()} to {actions.max()}, the environment "
            f"takes {low.min()} to {high.max()}; return finite actions in the environment's units, "
            "clipped to its box"
        )
    return actions
