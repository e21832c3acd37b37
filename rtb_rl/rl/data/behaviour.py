"""The behaviour policies shipped with the package: snapshots of soft actor-critic training runs.

`behaviours/<name>.safetensors` beside this file, written by benchmarks/behaviour_policies.py, hold
for each policy `early0`, `early1`, ..., `medium`, `expert`, the tensors `<policy>.<layer>.weight`
[out, in] and `.bias` of layer0, layer1, mean and log_std, and in its metadata, under the policy's
name, the JSON of its training step and mean return.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional

from rtb_rl.errors import InputError
from rtb_rl.rl.episodes.environments import action_box, make_environment

BEHAVIOURS_PATH = Path(__file__).parent / "behaviours"
ENVIRONMENTS = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5"}
LAYERS = ("layer0", "layer1", "mean", "log_std")


@dataclass(frozen=True)
class BehaviourPolicy:
    """action = tanh(mean(h) + exp(clip(log_std(h), -20, 2)) noise), rescaled to the box.

    h is the observation after layer0, relu, layer1, relu; noise is standard normal
    (arXiv 1801.01290, appendix C).
    """

    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Weight [out, in] and bias [out] of each layer."""
    low: torch.Tensor
    high: torch.Tensor
    step: int
    """Environment steps it was trained for."""
    mean_return: float
    """Mean return of a few episodes, measured in training."""

    def act(self, observations: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
        """Draw actions [batch, d_a] in the environment's units for observations [batch, d_o]."""
        hidden = functional.relu(functional.linear(observations, *self.layers["layer0"]))
        hidden = functional.relu(functional.linear(hidden, *self.layers["layer1"]))
        mean = functional.linear(hidden, *self.layers["mean"])
        std = functional.linear(hidden, *self.layers["log_std"]).clamp(-20, 2).exp()
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return self.low + (torch.tanh(mean + std * noise) + 1) / 2 * (self.high - self.low)


@dataclass(frozen=True)
class UniformPolicy:
    """Actions uniform in the box, whatever the observation."""

    low: torch.Tensor
    high: torch.Tensor

    def act(self, observations: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
        """Draw actions [batch, d_a]."""
        shape = (len(observations), len(self.low))
        uniform = torch.rand(shape, generator=generator, device=observations.device)
        return self.low + uniform * (self.high - self.low)


def behaviour_file(name: str) -> Path:
    """The file of that environment's policies; InputError naming those shipped if there is none."""
    path = BEHAVIOURS_PATH / f"{name}.safetensors"
    if name not in ENVIRONMENTS or not path.is_file():
        shipped = sorted(file.stem for file in BEHAVIOURS_PATH.glob("*.safetensors"))
        raise InputError(
            f"no behaviour policies for {name!r} in the package, only for: "
            f"{', '.join(shipped) or 'none'}; make some with benchmarks/behaviour_policies.py"
        )
    return path


def load_behaviours(name: str) -> dict[str, BehaviourPolicy]:
    """The shipped policies of `hopper`, `halfcheetah` or `walker2d`, least trained first."""
    path = behaviour_file(name)
    env = make_environment(ENVIRONMENTS[name])
    box = action_box(env)
    env.close()
    return read_behaviours(path, box)


def read_behaviours(path: Path, box: tuple[np.ndarray, np.ndarray]) -> dict[str, BehaviourPolicy]:
    """Every policy of a file, least trained first, acting in the box (low, high)."""
    low, high = (torch.from_numpy(bound) for bound in box)
    policies = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name, text in (file.metadata() or {}).items():
                layers = {
                    layer: (
                        file.get_tensor(f"{name}.{layer}.weight"),
                        file.get_tensor(f"{name}.{layer}.bias"),
                    )
                    for layer in LAYERS
                }
                policies[name] = BehaviourPolicy(layers, low, high, **json.loads(text))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is not a file of behaviour policies: {error}") from error
    for name, policy in policies.items():
        if (size := len(policy.layers["mean"][1])) != len(low):
            raise InputError(
                f"policy {name!r} of {path} has actions of {size} numbers, the environment of "
                f"{len(low)}; give the file made for this environment"
            )
    if not policies:
        raise InputError(f"{path} names no behaviour policy in its metadata")
    return dict(sorted(policies.items(), key=lambda item: item[1].step))
