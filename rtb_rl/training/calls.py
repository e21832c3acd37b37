"""How often networks were evaluated, counted where it happens."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class NetworkCalls:
    """Rows that went through some networks; one whose gradient is kept counts three times.

    That is the price of a forward pass and of a backward pass, twice as dear. A part of a
    checkpoint, so that the count goes on after an interruption.
    """

    def __init__(self, networks: Iterable[nn.Module]):
        self.total = 0
        self._hooks = [network.register_forward_pre_hook(self._count) for network in networks]

    def _count(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.total += len(inputs[0]) * (3 if torch.is_grad_enabled() else 1)

    def stop(self) -> None:
        """Count no more."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.total = state["total"]
