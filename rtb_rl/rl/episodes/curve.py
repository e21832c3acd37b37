"""A policy evaluated while it is trained: points of its learning curve, and the best of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rtb_rl.rl.episodes.evaluation import Policy, evaluate
from rtb_rl.training.checkpoint import replace_file

EPISODES = 5

Watch = Callable[[int, int, Policy], None]
"""Called after every step with the steps done, the steps in all, and the policy that would be kept
now."""


def unwatched(done: int, steps: int, policy: Policy) -> None:
    """The `Watch` that does nothing."""


class Curve:
    """A `Watch` that evaluates a policy `points` times, each after an equal share of the steps.

    A file keeps the points, so that those made before a kill are not made again. Evaluation draws
    from generators of its own: training goes on as if there were none.
    """

    def __init__(
        self, path: Path, env_id: str, *, points: int, seed: int, episodes: int = EPISODES
    ):
        self.path, self.env_id = path, env_id
        self.wanted, self.seed, self.episodes = points, seed, episodes

    @property
    def points(self) -> list[dict[str, Any]]:
        """`step`, of `steps` in all, and the `returns` of its episodes; in order of the steps."""
        return json.loads(self.path.read_text()) if self.path.exists() else []

    @property
    def best(self) -> dict[str, Any] | None:
        """The point of the highest mean return, the earlier of equals; None without points.

        Chosen by episodes in the environment, which an offline learner may not look at: an upper
        bound to report beside the last policy, not instead of it.
        """
        return max(self.points, key=lambda point: np.mean(point["returns"]), default=None)

    def __call__(self, done: int, steps: int, policy: Policy) -> None:
        due = done * self.wanted // steps
        if due == (done - 1) * self.wanted // steps:
            return
        points = self.points
        if any(point["step"] >= done for point in points):
            return
        device = getattr(policy, "device", "cpu")
        records = evaluate(
            policy, self.env_id, episodes=self.episodes, seed=self.seed, device=device
        )
        points.append({"step": done, "steps": steps, "returns": records.returns})
        replace_file(self.path, json.dumps(points, indent=2).encode())
