"""The network of the exact rung: it weighs the points of a smoothed data set."""

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import GaussianDiffusion
from rtb_rl.core.protocols import Condition
from rtb_rl.nn import MLP
from rtb_rl.tasks.image.smoothed import SmoothedImages, shares


class Reweighted(nn.Module):
    """The denoiser of sum_i w_i N(x_i, width^2 I), log w_i = network(x_i), as the prior's plus what
    the weights change.

    The network sees the points, starts at zero and is all that is learned; it knows nothing of the
    classes. The exact posterior is among these denoisers, so that whatever error is left comes from
    the training, or from few levels.
    """

    signal: Tensor
    noise: Tensor

    def __init__(
        self,
        prior: nn.Module,
        smoothed: SmoothedImages,
        diffusion: GaussianDiffusion,
        *,
        width: int,
        generator: Generator,
    ):
        super().__init__()
        self.prior, self.smoothed = prior, smoothed
        self.network = MLP(smoothed.points[0].numel(), 1, width=width, generator=generator)
        self.register_buffer("signal", diffusion.signal.flatten(1).float(), persistent=False)
        self.register_buffer("noise", diffusion.noise.flatten(1).float(), persistent=False)
        self._kept: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        signal, noise = self.signal[level], self.noise[level]
        with torch.no_grad():
            x0 = self.prior(x, level, condition)
            before = self.smoothed.scores(x, signal, noise)
        points = self.smoothed.points.flatten(1)
        moved = shares(before + self._log_weights()) @ points - shares(before) @ points
        spread = (signal * self.smoothed.width).square()
        return x0 + (noise.square() / (spread + noise.square()) * moved).reshape(x.shape)

    def _log_weights(self) -> Tensor:
        """Of every point: [n]. A chain asks for them at each level and they are the same at all, so
        that those without a gradient are kept until the network changes.
        """
        points = self.smoothed.points.flatten(1)
        if torch.is_grad_enabled():
            return self.network(points).squeeze(1)
        state = nn.utils.parameters_to_vector(self.network.parameters())
        if self._kept is None or not state.equal(self._kept[0]):
            self._kept = (state, self.network(points).squeeze(1))
        return self._kept[1]
