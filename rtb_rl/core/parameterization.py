"""Networks that predict noise, velocity or score, seen as Denoisers: turned once, at the border.

Each wraps a network `(x, level, condition) -> output` shaped as x, and returns the predicted x_0.
"""

import torch
from torch import Tensor, nn

from rtb_rl.core.protocols import Condition, Denoiser
from rtb_rl.core.schedules import Schedule


class _Prediction(nn.Module):
    """A network with the signal and noise of its schedule."""

    signal: Tensor
    noise: Tensor

    def __init__(self, network: Denoiser, schedule: Schedule):
        super().__init__()
        self.network = network
        self.register_buffer("signal", schedule.signal, persistent=False)
        self.register_buffer("noise", schedule.noise, persistent=False)

    def _refuse_zero_signal(self) -> None:
        if float(self.signal[-1]) == 0:
            raise ValueError(
                "no signal is left at the last level, where a prediction of noise or score says "
                "nothing about"
                " x0; predict velocity or clean data"
            )

    def _tables(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (x.ndim - 1)
        signal, noise = self.signal[level].to(x.dtype), self.noise[level].to(x.dtype)
        return signal.reshape(shape), noise.reshape(shape)


class VelocityPrediction(_Prediction):
    """x_0 = signal x - noise v (arXiv 2202.00512, appendix D)."""

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        signal, noise = self._tables(x, level)
        return torch.addcmul(signal * x, noise, self.network(x, level, condition), value=-1)


class NoisePrediction(_Prediction):
    """x_0 = (x - noise eps) / signal (arXiv 2006.11239 eq. 15)."""

    def __init__(self, network: Denoiser, schedule: Schedule):
        super().__init__(network, schedule)
        self._refuse_zero_signal()

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        signal, noise = self._tables(x, level)
        return (x - noise * self.network(x, level, condition)) / signal


class ScorePrediction(_Prediction):
    """x_0 = (x + noise^2 score) / signal, score = grad log p_k(x) (Tweedie; arXiv 2011.13456)."""

    def __init__(self, network: Denoiser, schedule: Schedule):
        super().__init__(network, schedule)
        self._refuse_zero_signal()

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        signal, noise = self._tables(x, level)
        return (x + noise.square() * self.network(x, level, condition)) / signal
