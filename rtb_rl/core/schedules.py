"""Signal and noise per level: x_k = signal[k] x_0 + noise[k] eps with signal^2 + noise^2 = 1.

For tokens the share that is not masked, per level.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Signal at levels 0..K, float64, strictly decreasing; noise = sqrt(1 - signal^2).

    Level 0 is what the chain delivers: signal 1, or a little less where a foreign scheduler stops
    short of clean data.
    """

    signal: Tensor

    def __post_init__(self):
        signal = self.signal
        if signal.ndim != 1 or len(signal) < 2:
            raise ValueError(
                f"a schedule needs signals at levels 0..K with K >= 1, not shape "
                f"{tuple(signal.shape)}"
            )
        if not 0 < signal[0] <= 1 or signal[-1] < 0 or not bool((signal.diff() < 0).all()):
            raise ValueError(
                "signal must start at 1, or a little less, strictly decrease and stay >= 0"
            )

    @property
    def levels(self) -> int:
        return len(self.signal) - 1

    @property
    def noise(self) -> Tensor:
        return (1 - self.signal.square()).sqrt()

    @property
    def step_variance(self) -> Tensor:
        """beta_k, the noise added from level k - 1 to k: [K + 1], with beta_0 = 0 by convention."""
        ratio = self.signal[1:] / self.signal[:-1]
        return torch.cat([torch.zeros(1, dtype=ratio.dtype), 1 - ratio.square()])


def linear_schedule(levels: int, *, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """Betas linear from `first` to `last` of a 1000-step chain, rescaled by 1000 / levels.

    Without the rescaling a short chain ends far from noise (signal 0.68 at 75 levels) and N(0, I)
    is not its start law. DDPM, arXiv 2006.11239 section 4. Raises ValueError where the rescaled
    beta reaches 1 (levels <= 20).
    """
    beta = torch.linspace(first, last, levels, dtype=torch.float64) * (1000 / levels)
    largest = last * 1000 / levels
    if largest >= 1:
        raise ValueError(
            f"a linear schedule of {levels} levels has beta {largest:.3g} >= 1 after rescaling;"
            f" use more than {int(1000 * last)} levels, or vp_schedule"
        )
    return _from_signal_squared((1 - beta).cumprod(0))


def vp_schedule(levels: int, *, beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """The variance-preserving SDE at times k / K; signal left exp(-(beta_min + beta_max) / 4) =
    0.0066.

    arXiv 2011.13456 eq. 32-33. Any number of levels.
    """
    time = torch.linspace(0, 1, levels + 1, dtype=torch.float64)[1:]
    return _from_signal_squared(
        (-beta_min * time - (beta_max - beta_min) * time.square() / 2).exp()
    )


def cosine_schedule(levels: int, *, offset: float = 0.008, last_signal: float = 1e-3) -> Schedule:
    """Squared signal cos^2 of an angle rising linearly; the last signal is `last_signal`, or less.

    arXiv 2102.09672 eq. 17.
    """
    time = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    squared = ((time + offset) / (1 + offset) * math.pi / 2).cos().square()
    squared = (squared / squared[0])[1:]
    squared[-1] = min(last_signal**2, float(squared[-2:][0]) / 4)
    return _from_signal_squared(squared)


def log_snr_schedule(
    levels: int, *, first_noise: float = 0.06, last_signal: float = 0.05
) -> Schedule:
    """noise / signal geometric from `first_noise` at level 1 to 1 / `last_signal` at level K.

    Even steps of log signal-to-noise ratio (arXiv 2107.00630 section 3.1 on why that is what
    counts): few levels then still resolve data much narrower than the noise.
    """
    ends = torch.tensor([first_noise, 1 / last_signal], dtype=torch.float64).log()
    ratio = torch.linspace(float(ends[0]), float(ends[1]), levels, dtype=torch.float64).exp()
    return _from_signal_squared(1 / (1 + ratio.square()))


def zero_terminal_signal(schedule: Schedule) -> Schedule:
    """The schedule shifted and scaled so that no signal is left at level K (arXiv 2305.08891,
    algorithm 1).

    Its last level needs predictions of clean data or velocity: a noise prediction says nothing
    about x0 there.
    """
    signal = schedule.signal[1:]
    if len(signal) < 2:
        raise ValueError("zero terminal signal needs at least two levels")
    rescaled = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    return _from_signal_squared(rescaled.square())


def _from_signal_squared(squared: Tensor) -> Schedule:
    return Schedule(torch.cat([torch.ones(1, dtype=torch.float64), squared.sqrt()]))


@dataclass(frozen=True)
class MaskingSchedule:
    """Share of the tokens kept (not masked) at levels 0..K, float64, strictly decreasing, 1 to 0.

    No token is left at level K: a chain that keeps some has no start law in common with another.
    """

    kept: Tensor

    def __post_init__(self):
        kept = self.kept
        if kept.ndim != 1 or len(kept) < 2 or kept.dtype != torch.float64:
            raise ValueError(
                "a masking schedule needs float64 shares at levels 0..K with K >= 1, not"
                f" {kept.dtype} of shape {tuple(kept.shape)}"
            )
        if kept[0] != 1 or kept[-1] != 0 or not bool((kept.diff() < 0).all()):
            raise ValueError(
                "the share of kept tokens must start at 1 (level 0 is clean data), strictly"
                f" decrease and end at 0 (level K is all mask); given: {kept.tolist()}"
            )

    @property
    def levels(self) -> int:
        return len(self.kept) - 1

    @property
    def reveal_probability(self) -> Tensor:
        """rho_k = (kept[k - 1] - kept[k]) / (1 - kept[k]): [K + 1], index by level.

        The probability that a token masked at level k is revealed in the step to k - 1; rho_1 = 1.
        Entry 0 belongs to no step and is 0. arXiv 2406.07524.
        """
        revealed = (self.kept[:-1] - self.kept[1:]) / (1 - self.kept[1:])
        return torch.cat([torch.zeros(1, dtype=torch.float64), revealed])


def linear_masking(levels: int) -> MaskingSchedule:
    """kept = 1 - k / K: each step reveals as many tokens on average, rho_k = 1 / k.

    The log-linear schedule of arXiv 2310.16834 without its offset, which keeps some tokens at K.
    """
    return MaskingSchedule(1 - torch.linspace(0, 1, levels + 1, dtype=torch.float64))


def cosine_masking(levels: int) -> MaskingSchedule:
    """kept = 1 - cos((1 - k / K) pi / 2): few tokens in the first denoising steps, many in the
    last, when they depend less on each other (arXiv 2202.04200 section 3.3).
    """
    time = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    kept = 1 - ((1 - time) * math.pi / 2).cos()
    kept[0] = 1  # exactly: cos(pi / 2) is 6e-17
    return MaskingSchedule(kept)
