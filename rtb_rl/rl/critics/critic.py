"""Critics: what an action is worth in a state. The protocol, the IQL critic, and a user's own."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rtb_rl.errors import InputError
from rtb_rl.nn.ensemble import EnsembleMLP


class Critic(Protocol):
    """Any object with `q`: expected discounted return of an action, in the data's reward units.

    observation [batch, observation size] as the data set holds it, action [batch, action size] in
    [-1, 1]; the result is [batch], finite, float32 or float64. Rows do not influence each other.
    Where a gradient by the action is wanted (Langevin term), `q` must be differentiable.
    """

    def q(self, observation: Tensor, action: Tensor) -> Tensor: ...


class ValueCritic(Critic, Protocol):
    """A critic that also knows `v`, the value of the state: [batch, observation size] -> [batch].

    Advantages q - v need it; everything else works with `q` alone.
    """

    def v(self, observation: Tensor) -> Tensor: ...


class ObservationScaler(nn.Module):
    """(observation - mean) / std with the mean and std of given data; the identity until then.

    Mean and std are buffers, stored and restored with the weights. A std below 1e-3 counts as
    1e-3, so that a constant coordinate stays finite.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, observation_size: int, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(observation_size, device=device))
        self.register_buffer("std", torch.ones(observation_size, device=device))

    @torch.no_grad()
    def fit(self, observations: Tensor) -> None:
        """Take mean and std over the rows of observations [n, observation size], n > 0."""
        shape = list(observations.shape)
        if len(shape) != 2 or shape[1] != len(self.mean) or not shape[0]:
            raise InputError(
                f"observations to standardise by have shape {shape}, the network expects "
                f"[n, {len(self.mean)}] with n > 0; give the observations of the same data set"
            )
        if not torch.isfinite(observations).all():
            raise InputError(
                "observations to standardise by contain NaN or infinite values, mean and std need "
                "finite ones; remove those rows from the data set"
            )
        std, mean = torch.std_mean(observations.double(), dim=0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=1e-3))

    def forward(self, observation: Tensor) -> Tensor:
        return (observation - self.mean) / self.std


class IQLCritic(nn.Module):
    """The networks of IQL: an ensemble of Q, read as its minimum, and one V (arXiv 2110.06169).

    `members` is 2 as published; more make the minimum more cautious. Units are those of the
    rewards trained on. Observations are taken as they are until `standardise` is called.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        *,
        members: int = 2,
        width: int = 256,
        depth: int = 2,
        layer_norm: bool = False,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.scaler = ObservationScaler(observation_size, device=generator.device)

        network = partial(
            EnsembleMLP,
            output_size=1,
            width=width,
            depth=depth,
            layer_norm=layer_norm,
            generator=generator,
        )
        self.q_network = network(observation_size + action_size, members=members)
        self.v_network = network(observation_size, members=1)

    def standardise(self, observations: Tensor) -> None:
        """Standardise inputs by the mean and std of a data set's observations [n, size]."""
        self.scaler.fit(observations)

    def q(self, observation: Tensor, action: Tensor) -> Tensor:
        """min over members of Q(s, a), [batch]."""
        inputs = torch.cat([self.scaler(observation), action], dim=1)
        return self.q_network(inputs).squeeze(-1).amin(dim=0)

    def action_gradient(self, observation: Tensor, action: Tensor) -> Tensor:
        """d q / d action, [batch, action size]: the gradient of the least member."""
        inputs = torch.cat([self.scaler(observation), action], dim=1)
        values, slopes = self.q_network.input_gradient(inputs)
        least = values.argmin(0)
        return slopes[least, torch.arange(len(action), device=least.device), observation.shape[1] :]

    def v(self, observation: Tensor) -> Tensor:
        """V(s), [batch]."""
        return self.v_network(self.scaler(observation)).flatten()


def load_critic(spec: str, dataset: object) -> Critic:
    """The critic that the factory named `package.module:factory` makes.

    The factory receives the data set if its first argument has no default or is called `dataset`;
    otherwise it is called without arguments. The current directory is searched after installed
    packages, so `my_critic:make` finds `my_critic.py` there. What the user's own code raises is
    passed on as it is.
    """
    module_name, _, factory_name = spec.partition(":")
    if not module_name or not factory_name:
        raise InputError(
            f"critic {spec!r} is not of the form package.module:factory; "
            "for a function `make` in my_critic.py write my_critic:make"
        )
    factory = _find_factory(_import_module(module_name, spec), factory_name, spec)
    critic = factory(dataset) if _takes_dataset(factory, spec) else factory()
    return _require_q(critic, f"critic factory {spec!r} returned")


def check_critic(
    critic: Critic,
    observation_size: int,
    action_size: int,
    *,
    device: torch.device | str = "cpu",
) -> None:
    """Raise InputError unless `q`, and `v` if there is one, keep the contract of `Critic`: they are
    tried without gradient on one and on three rows with entries in [-1, 1].
    """
    _require_q(critic, "the critic given is")
    for rows in (1, 3):
        observation = _probe(rows, observation_size, device)
        action = _probe(rows, action_size, device)
        _check_values(critic.q, "q", (observation, action))
        value = getattr(critic, "v", None)
        if value is not None:
            _check_values(value, "v", (observation,))


def _require_q(critic: Any, found: str) -> Critic:
    if isinstance(critic, type) or not callable(getattr(critic, "q", None)):
        what = f"the class {critic.__name__}" if isinstance(critic, type) else f"{critic!r}"
        raise InputError(
            f"{found} {what}, but a critic is an object with a method q; "
            "define q(observation [batch, d_o], action [batch, d_a]) returning [batch]"
        )
    return critic


def _probe(rows: int, size: int, device: torch.device | str) -> Tensor:
    return torch.linspace(-1.0, 1.0, rows * size, device=device).reshape(rows, size)


@torch.no_grad()
def _check_values(function: Callable[..., object], name: str, inputs: tuple[Tensor, ...]) -> None:
    shapes = " and ".join(str(list(tensor.shape)) for tensor in inputs)
    call = f"critic.{name} on inputs of shape {shapes}"
    rows = len(inputs[0])
    try:
        values = function(*inputs)
    except Exception as error:
        raise InputError(
            f"{call} (the data set's sizes, on {inputs[0].device}) raised {type(error).__name__}: "
            f"{error}; give a critic for this data set that takes these shapes where they are (a "
            f"torch module is moved there) and returns [{rows}]"
        ) from error
    if not isinstance(values, Tensor):
        raise InputError(
            f"{call} returned {type(values).__name__}, expected a torch.Tensor of shape [{rows}]; "
            "convert the result with torch.as_tensor"
        )
    if values.shape != (rows,):
        raise InputError(
            f"{call} returned shape {list(values.shape)}, expected [{rows}], one number per row; "
            "remove the other axes, for example by squeeze(-1) or min over an ensemble"
        )
    if values.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"{call} returned {values.dtype}, expected torch.float32 or torch.float64; "
            "end the method with .float()"
        )
    if not torch.isfinite(values).all():
        raise InputError(
            f"{call}, entries in [-1, 1], returned {values.tolist()}, expected finite numbers; "
            "check the critic's weights, and bound logarithms and divisions in it"
        )


def _import_module(name: str, spec: str) -> object:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            as_module = f"write {os.path.basename(spec).replace('.py:', ':')}, without .py"
            cure = as_module if ".py:" in spec else "correct the name, or start from its folder"
            raise InputError(
                f"critic {spec!r} names the module {missing!r}, which is neither installed nor in "
                f"the current directory {os.getcwd()}; {cure}"
            ) from error
        raise InputError(
            f"critic {spec!r}: the module {name!r} imports {missing!r}, which is not installed; "
            f"install {missing!r}"
        ) from error


def _find_factory(module: object, name: str, spec: str) -> Callable[..., object]:
    factory = getattr(module, name, None)
    if callable(factory):
        return factory
    callables = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
    near = get_close_matches(name, callables) or sorted(callables)
    found = "nothing of that name" if factory is None else f"a {type(factory).__name__} there"
    raise InputError(
        f"critic {spec!r} needs a callable {name!r}, the module has {found}; "
        f"it offers {', '.join(near) or 'no function or class'}"
    )


def _takes_dataset(factory: Callable[..., object], spec: str) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in inspect.signature(factory).parameters.values() if p.kind in kinds]
    required = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    if len(required) > 1:
        raise InputError(
            f"critic factory {spec!r} needs {len(required)} arguments ({', '.join(required)}), it "
            "is called with the data set or with nothing; give the others default values"
        )
    return bool(required) or (bool(parameters) and parameters[0].name == "dataset")
