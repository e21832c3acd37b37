"""What the core expects of its parts. Anything with these methods will do; nothing needs to
inherit.
"""

from collections.abc import Sequence
from typing import Any, Protocol, Self

from torch import Generator, Tensor

Condition = Tensor | dict[str, Tensor] | None
"""What a model is conditioned on: nothing, a tensor [batch, ...], or a dict of such tensors."""


class Denoiser(Protocol):
    """A network only: predicts clean data from noisy data.

    What it returns is read by its Diffusion alone. Gaussian: the predicted x0, shaped as `x`, or a
    ScaledPrediction. Masked: log-probabilities [batch, length, vocabulary], or a RevealPrediction.
    Deterministic while it is being scored (no dropout).
    """

    def __call__(self, x: Tensor, level: Tensor, condition: Condition) -> Any:
        """`x`: [batch, *event]; `level`: int64 [batch], in 1..K."""
        ...


class Kernel(Protocol):
    """The law of one denoising step, p(x[k-1] | x[k]), for every row of a batch."""

    def sample(self, *, generator: Generator) -> Tensor:
        """One draw a row, without graph: [batch, *event]."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), nats: [batch]. Differentiable in the prediction that made the kernel."""
        ...

    def log_ratio(self, other: Self, x: Tensor) -> Tensor:
        """log p_self(x) - log p_other(x), nats: [batch]. Exactly zero for equal predictions."""
        ...

    def widened(self, factor: float) -> Self:
        """A flatter law to explore with: Gaussian, `factor` times the spread; tokens, `factor`
        times the temperature.
        """
        ...


class Diffusion(Protocol):
    """No network: the space, the grid of levels, noising, and how a prediction becomes a step."""

    @property
    def levels(self) -> int:
        """K, the number of denoising steps."""
        ...

    @property
    def event_shape(self) -> Sequence[int]:
        """Shape of one point, without the batch axis."""
        ...

    @property
    def signal_left(self) -> float:
        """Signal at level K. Above zero, x[0] depends on x[K], and a posterior that keeps the
        prior's start law can't be exact.
        """
        ...

    def start(self, batch: int, *, generator: Generator) -> Tensor:
        """Draws of x[K]: [batch, *event]. The same law for prior and posterior."""
        ...

    def kernel(self, prediction: Any, x: Tensor, level: Tensor) -> Kernel:
        """The law of x[level - 1] given x = x[level]; levels may differ inside the batch."""
        ...

    def corrupt(self, x0: Tensor, level: Tensor, *, generator: Generator) -> Tensor:
        """A draw of x[level] given x[0]: [batch, *event]; one level a row, 0..K."""
        ...

    def noise_path(self, x0: Tensor, *, generator: Generator) -> Tensor:
        """A draw of x[0..K] given x[0], as [K + 1, batch, *event]."""
        ...

    def denoising_loss(self, prediction: Any, x0: Tensor, x: Tensor, level: Tensor) -> Tensor:
        """The loss whose minimum over predictions is the exact denoiser: [batch]."""
        ...


class LogReward(Protocol):
    """log r(x0, condition), nats, without beta: [batch]. Any black box; called without gradient."""

    def __call__(self, x0: Tensor, condition: Condition) -> Tensor: ...


class LogZ(Protocol):
    """An estimate of log Z for each row: [batch]."""

    def __call__(self, condition: Condition, log_weight: Tensor) -> Tensor: ...

    def start_at(self, log_weight: Tensor) -> None:
        """Called once, with the first batch of log-weights; a learned estimate starts there."""
        ...


class Objective(Protocol):
    """A loss, scalar, of [batch] numbers in nats; differentiable in `log_z` and `log_ratio`."""

    def __call__(
        self, log_z: Tensor, log_ratio: Tensor, log_reward: Tensor, beta: float
    ) -> Tensor: ...
