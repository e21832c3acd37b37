"""Generators derived from one seed and a name, so that no two parts share a stream."""

import hashlib

import torch
from torch import Generator, Tensor


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed in 0..2^63 - 1 that depends on the seed and every name."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(
    seed: int, *names: str | int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator of its own for the part so named."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *names))


class GeneratorState:
    """A generator as a part of a checkpoint."""

    def __init__(self, generator: Generator):
        self.generator = generator

    def state_dict(self) -> dict[str, Tensor]:
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["state"])
