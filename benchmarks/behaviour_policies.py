"""Train the behaviour policies that the package ships, and choose which snapshots to keep.

    python benchmarks/behaviour_policies.py train  --env-id Hopper-v5 --out runs/behaviour/hopper
    python benchmarks/behaviour_policies.py select --snapshots runs/behaviour/hopper \
        --out rtb_rl/rl/data/behaviours/hopper.safetensors

`train` runs soft actor-critic (arXiv 1801.01290; stable-baselines3) and writes the actor every few
thousand steps together with the mean return of its stochastic policy. `select` keeps the path to
the first policy that reaches a third of the best return (early ... medium) and the best one
(expert), which is D4RL's recipe (arXiv 2004.07219, appendix C). Needs the extra `benchmarks`; the
package itself only reads the selected file.
"""

# pyright: reportMissingImports=false
# stable-baselines3 comes with the extra `benchmarks` alone

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import numpy as np
import torch
import tyro
from safetensors.torch import load_file, save_file
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback


@dataclass(frozen=True)
class Train:
    """Train one actor and write its snapshots."""

    out: Path
    """Directory of the snapshots."""
    env_id: str = "Hopper-v5"
    steps: int = 500_000
    """Environment steps, one gradient step each."""
    snapshot_every: int = 10_000
    episodes: int = 5
    """Episodes of the stochastic policy behind the return written beside each snapshot."""
    width: int = 64
    """Width of the actor's two hidden layers; the critics have 256."""
    seed: int = 0


@dataclass(frozen=True)
class Select:
    """Choose the snapshots to ship."""

    snapshots: Path
    out: Path
    medium_fraction: float = 1 / 3
    """Medium is the first snapshot with this fraction of the best return."""
    num_early: int = 6
    """Snapshots kept on the way to medium."""


def actor_tensors(model: BaseAlgorithm) -> dict[str, torch.Tensor]:
    """The actor as layer0 -> relu -> layer1 -> relu -> (mean, log_std), weights [out, in]."""
    actor: Any = model.policy.actor
    layers = {
        "layer0": actor.latent_pi[0],
        "layer1": actor.latent_pi[2],
        "mean": actor.mu,
        "log_std": actor.log_std,
    }
    return {
        f"{name}.{part}": getattr(layer, part).detach().cpu().clone()
        for name, layer in layers.items()
        for part in ("weight", "bias")
    }


class Snapshots(BaseCallback):
    """Write the actor and the return of its stochastic policy at a fixed interval."""

    def __init__(self, settings: Train):
        super().__init__()
        self.settings = settings
        self.env = gymnasium.make(settings.env_id)

    def _on_step(self) -> bool:
        if self.num_timesteps % self.settings.snapshot_every == 0:
            returns = [self._episode(seed) for seed in range(self.settings.episodes)]
            name = f"{self.num_timesteps:08d}"
            save_file(actor_tensors(self.model), self.settings.out / f"{name}.safetensors")
            row = {
                "step": self.num_timesteps,
                "mean_return": float(np.mean(returns)),
                "returns": returns,
            }
            with open(self.settings.out / "returns.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            print(row["step"], round(row["mean_return"], 1), flush=True)
        return True

    def _episode(self, seed: int) -> float:
        observation, _ = self.env.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            action, _ = self.model.predict(observation, deterministic=False)
            observation, reward, terminated, truncated, _ = self.env.step(action)
            total, over = total + float(reward), terminated or truncated
        return total


def train(settings: Train) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    policy = {"net_arch": {"pi": [settings.width, settings.width], "qf": [256, 256]}}
    model = SAC(
        "MlpPolicy",
        settings.env_id,
        policy_kwargs=policy,
        learning_starts=5_000,
        seed=settings.seed,
    )
    model.learn(settings.steps, callback=Snapshots(settings))


def select(settings: Select) -> None:
    lines = (settings.snapshots / "returns.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    best = max(rows, key=lambda row: row["mean_return"])
    medium = next(
        row for row in rows if row["mean_return"] >= settings.medium_fraction * best["mean_return"]
    )
    before = [row for row in rows if row["step"] < medium["step"]]
    picks = (
        np.unique(np.linspace(0, len(before) - 1, settings.num_early).round().astype(int))
        if before
        else []
    )
    chosen = {f"early{i}": before[j] for i, j in enumerate(picks)} | {
        "medium": medium,
        "expert": best,
    }
    tensors, metadata = {}, {}
    for name, row in chosen.items():
        for key, value in load_file(settings.snapshots / f"{row['step']:08d}.safetensors").items():
            tensors[f"{name}.{key}"] = value
        metadata[name] = json.dumps({"step": row["step"], "mean_return": row["mean_return"]})
        print(f"{name:8s} step {row['step']:7d}  mean return {row['mean_return']:8.1f}")
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, settings.out, metadata=metadata)


def main() -> None:
    command = tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Select, tyro.conf.subcommand("select")]
    )
    train(command) if isinstance(command, Train) else select(command)


if __name__ == "__main__":
    main()
