"""Recorded episodes of a policy: what data sets are made of."""

from collections.abc import Callable

import gymnasium
import numpy as np
import torch
from minari.data_collector import EpisodeBuffer

from rtb_rl.rl.episodes.environments import action_box, make_environment
from rtb_rl.rl.episodes.evaluation import Policy, derived_seed, policy_actions


class _Recording:
    """One episode while it runs."""

    def __init__(self, env: gymnasium.Env, index: int, seed: int):
        self.env, self.index, self.seed = env, index, seed
        self.observations = [env.reset(seed=seed)[0]]
        self.actions: list[np.ndarray] = []
        self.rewards: list[float] = []
        self.terminated = self.truncated = False

    @property
    def over(self) -> bool:
        return self.terminated or self.truncated

    def step(self, action: np.ndarray) -> None:
        observation, reward, self.terminated, self.truncated, _ = self.env.step(action)
        self.observations.append(observation)
        self.actions.append(action)
        self.rewards.append(float(reward))

    def episode(self, length: int) -> EpisodeBuffer:
        """Its first `length` steps; an end that is not the environment's own is a truncation."""
        terminations, truncations = np.zeros((2, length), dtype=bool)
        terminations[-1] = self.terminated and length == len(self.rewards)
        truncations[-1] = not terminations[-1]
        return EpisodeBuffer(
            seed=self.seed,
            observations=np.stack(self.observations[: length + 1]),  # pyright: ignore
            actions=np.stack(self.actions[:length]),  # pyright: ignore
            rewards=np.array(self.rewards[:length]),  # pyright: ignore
            terminations=terminations,  # pyright: ignore
            truncations=truncations,  # pyright: ignore
        )


def roll_out(
    policy: Policy,
    env_id: str,
    *,
    steps: int,
    seed: int,
    num_environments: int = 20,
    progress: Callable[[int], None] | None = None,
) -> list[EpisodeBuffer]:
    """Episodes of that many steps in all, in the order of their start; the last may be cut.

    Several environments run side by side with one policy call per step. Which episodes are taken
    depends on the order of their start only, so short ones are not favoured.
    """
    environments = [make_environment(env_id) for _ in range(min(num_environments, steps))]
    box = action_box(environments[0])
    generator = torch.Generator().manual_seed(derived_seed(seed, 0))
    recordings: list[_Recording] = []

    def start(env: gymnasium.Env) -> _Recording:
        number = len(recordings)
        recordings.append(_Recording(env, number, derived_seed(seed, 1, number)))
        return recordings[-1]

    running, total = [start(env) for env in environments], 0
    while running:
        _step_all(running, policy, generator, box)
        if progress is not None:
            progress(min(len(running), max(0, steps - total)))
        total += len(running)
        ended = [recording for recording in running if recording.over]
        running = [recording for recording in running if not recording.over]
        if total < steps:
            running += [start(recording.env) for recording in ended]
        else:
            upto = np.cumsum([len(recording.rewards) for recording in recordings])
            running = [recording for recording in running if upto[recording.index] < steps]
    for env in environments:
        env.close()
    return _first_steps(recordings, steps)


def _step_all(
    running: list[_Recording],
    policy: Policy,
    generator: torch.Generator,
    box: tuple[np.ndarray, np.ndarray],
) -> None:
    observations = np.stack([recording.observations[-1] for recording in running])
    actions = policy_actions(policy, observations, generator, box)
    for recording, action in zip(running, actions, strict=True):
        recording.step(action)


def _first_steps(recordings: list[_Recording], steps: int) -> list[EpisodeBuffer]:
    episodes = []
    for recording in recordings:
        if steps > 0:
            episodes.append(recording.episode(min(steps, len(recording.rewards))))
            steps -= len(recording.rewards)
    return episodes
