"""An exponential moving average of a network's trained parameters."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class TrainedState:
    """What training changes of a module, as a part of a checkpoint: not its frozen parameters.

    Those were loaded with the module itself, and may be most of it.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        named = module.named_parameters(remove_duplicate=False)  # tied weights have two names
        self.frozen = {name for name, p in named if not p.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        state = self.module.state_dict()
        return {name: tensor for name, tensor in state.items() if name not in self.frozen}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        found = self.module.load_state_dict(state, strict=False)
        missing = set(found.missing_keys) - self.frozen
        if missing or found.unexpected_keys:
            raise KeyError(
                f"the checkpoint lacks {sorted(missing)} and has {found.unexpected_keys} too many"
            )


class Average:
    """average <- average + (1 - decay) (parameters - average), once an update.

    The decay starts low, min(decay, (1 + n) / (10 + n)) at update n, so that the first parameters
    are soon forgotten. `module` is the averaged network, without gradients: its frozen parameters
    are those of `source`, in the same memory; buffers are copied.
    """

    def __init__(self, source: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        trained = [name for name, p in source.named_parameters() if p.requires_grad]
        shared = {id(p): p for p in source.parameters() if not p.requires_grad}
        self.module = copy.deepcopy(source, shared)
        self.state = TrainedState(self.module)
        parameters = dict(self.module.named_parameters())
        self._averaged = [parameters[name] for name in trained]
        self.module.requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        trained = (p for p in source.parameters() if p.requires_grad)
        for average, parameter in zip(self._averaged, trained, strict=True):
            average.lerp_(parameter, weight)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor | int]:
        return {**self.state.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self.state.load_state_dict(tensors)
        self.updates = int(state["updates"])
