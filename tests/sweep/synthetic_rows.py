"""Rows like those of finished runs, without any run."""

import json

import numpy as np

HOPPER = [-20.272305, 3234.3]


def row(agent="iql", task="hopper", seed=0, scores=(50.0, 60.0), **others):
    """A row whose episodes have these normalised scores; `others` replace its values."""
    low, high = HOPPER
    found = {
        "agent": agent,
        "method": agent,
        "task": task,
        "seed": seed,
        "dataset": task,
        "data_sha256": "ab" * 32,
        "origin": "file",
        "env_id": "Hopper-v4",
        "reference_returns": HOPPER,
        "returns": [low + score / 100 * (high - low) for score in scores],
        "budget": "demo",
        "beta": None,
        "overrides": {},
        "curve": [],
        "best": None,
        "timings": {"critic": 60.0, "policy": 30.0},
        "wall_seconds": 40.0,
        "peak_memory_bytes": 2**29,
        "versions": {"mujoco": "3.3.0", "gymnasium": "1.2.0"},
        "commit": "0123456789abcdef",
        "created": "2026-01-02T03:04:05Z",
    }
    return found | others


def grid(means, seeds=3, episodes=4, **others):
    """Rows of {(task, agent): mean score}, with seeds and episodes around each mean."""
    random = np.random.default_rng(7)
    return [
        row(agent, task, seed, random.normal(mean + random.normal(0, 2), 2, episodes), **others)
        for (task, agent), mean in means.items()
        for seed in range(seeds)
    ]


def write(path, rows):
    """The rows as a JSON-lines file."""
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path
