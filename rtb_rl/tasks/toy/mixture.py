"""Gaussian mixtures: densities, draws, and everything about them that diffusion and tilts keep
closed.

Means may carry batch axes in front (one mixture for every row of a condition); points then do too,
followed by an axis of draws: means [*rows, n, size] go with points [*rows, draws, size].
"""

import math

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import GaussianDiffusion, ScaledPrediction, Schedule
from rtb_rl.core.gaussian import small_spread
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError

ROUNDING = 1e-5
"""By which halves of a covariance may differ, as a share of its largest entry."""


class GaussianMixture:
    """sum_n weights[n] N(means[n], covariances[n]), in float64.

    `weights`: [*rows, n], summing to one; `means`: [*rows, n, size]; `covariances`: [n, size,
    size], symmetric positive definite and shared by the rows. InputError for anything else.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor):
        self.weights, self.means, self.covariances = (
            values.to(torch.float64) for values in (weights, means, covariances)
        )
        count, size = self.means.shape[-2:]
        if self.weights.shape[-1:] != (count,) or self.covariances.shape != (count, size, size):
            raise InputError(
                f"means {tuple(means.shape)} need weights [..., {count}] and covariances"
                f" {(count, size, size)}, not {tuple(weights.shape)} and"
                f" {tuple(covariances.shape)}"
            )
        for name in ("weights", "means", "covariances"):
            if not bool(getattr(self, name).isfinite().all()):
                raise InputError(
                    f"the {name} of a mixture must be finite; some are NaN or infinite"
                )
        if bool((self.weights < 0).any()) or bool((self.weights.sum(-1) - 1).abs().max() > 1e-6):
            raise InputError("the weights of a mixture must be >= 0 and sum to 1; normalise them")
        halves = float((self.covariances - self.covariances.mT).abs().max())
        if halves > ROUNDING * float(self.covariances.abs().max()):
            raise InputError(
                f"covariances must be symmetric, and two of their halves differ by {halves:.3g};"
                " give (covariance + covariance.mT) / 2"
            )
        self.variances, self.vectors = torch.linalg.eigh(self.covariances)
        if not bool((self.variances > 0).all()):
            raise InputError(
                f"covariances must be positive definite; the smallest variance along an axis is"
                f" {float(self.variances.min()):.3g}"
            )

    @property
    def size(self) -> int:
        return self.means.shape[-1]

    def log_components(self, x: Tensor) -> Tensor:
        """log weights[n] N(x; means[n], covariances[n]), nats: [*rows, draws, n]."""
        error = x[..., None, :].to(torch.float64) - self.means[..., None, :, :]
        error = torch.einsum("...nd,nde->...ne", error, self.vectors)
        terms = error.square() / self.variances + (2 * math.pi * self.variances).log()
        return self.weights.log()[..., None, :] - terms.sum(-1) / 2

    def log_prob(self, x: Tensor) -> Tensor:
        """log density, nats: [*rows, draws]."""
        return self.log_components(x).logsumexp(-1)

    def log_responsibilities(self, x: Tensor) -> Tensor:
        """log p(component | x): [*rows, draws, n]."""
        return self.log_components(x).log_softmax(-1)

    def component(self, x: Tensor) -> Tensor:
        """The most responsible component: int64 [*rows, draws]."""
        return self.log_components(x).argmax(-1)

    def nearest(self, x: Tensor) -> Tensor:
        """The component with the nearest mean, whatever the weights: int64 [*rows, draws]."""
        return torch.cdist(x.to(torch.float64), self.means).argmin(-1)

    def sample(self, n: int, *, generator: Generator) -> Tensor:
        """`n` draws for every row: [*rows, n, size]."""
        rows = self.weights.shape[:-1]
        component = torch.multinomial(
            self.weights.reshape(-1, self.weights.shape[-1]), n, True, generator=generator
        ).reshape(*rows, n)
        noise = torch.randn(*rows, n, self.size, generator=generator, dtype=torch.float64)
        factors = self.vectors * self.variances.sqrt()[:, None, :]
        for index, factor in enumerate(factors):
            chosen = component == index
            noise[chosen] = noise[chosen] @ factor.mT
        return noise + self.means.take_along_dim(component[..., None], -2)

    def reweighted(self, log_gain: Tensor) -> tuple["GaussianMixture", Tensor]:
        """Weights times exp(log_gain) [*rows, n], normalised; and the log of the normaliser."""
        log_weights = self.weights.log() + log_gain
        means = self.means.expand(*log_weights.shape, self.size)
        mixture = GaussianMixture(log_weights.softmax(-1), means, self.covariances)
        return mixture, log_weights.logsumexp(-1)

    def tilted(self, slope: Tensor) -> tuple["GaussianMixture", Tensor]:
        """The mixture times exp(slope . x), normalised; and the log of the normaliser.

        `slope`: [*rows, size]. Weights w exp(b.m + b.S b / 2), means m + S b.
        """
        slope = slope.to(torch.float64)[..., None, :]
        shift = torch.einsum("nde,...e->...nd", self.covariances, slope.squeeze(-2))
        log_gain = (slope * (self.means + shift / 2)).sum(-1)
        same, log_z = self.reweighted(log_gain)
        return GaussianMixture(same.weights, self.means + shift, self.covariances), log_z

    def observed(
        self, operator: Tensor, noise: Tensor, y: Tensor
    ) -> tuple["GaussianMixture", Tensor]:
        """The law of x given y = operator x + N(0, noise), and log p(y).

        `operator`: [m, size]; `noise`: covariance [m, m]; `y`: [*rows, m]. Kalman's update of each
        component, weighted by the density it gives to y.
        """
        cross = self.covariances @ operator.mT
        total = operator @ cross + noise
        gain = torch.linalg.solve(total, cross.mT).mT
        error = y.to(torch.float64)[..., None, :] - self.means @ operator.mT
        same, log_z = self.reweighted(gaussian_log_prob(error, total))
        means = self.means + torch.einsum("ndm,...nm->...nd", gain, error)
        covariances = self.covariances - gain @ cross.mT
        return GaussianMixture(same.weights, means, (covariances + covariances.mT) / 2), log_z

    def denoiser(self, schedule: Schedule) -> "MixtureDenoiser":
        """E[x_0 | x_k] for data from this mixture."""
        return MixtureDenoiser(self, schedule)


class MixtureDenoiser(nn.Module):
    """E[x_0 | x_k]: the components' posterior means, weighted by their responsibilities.

    Works along the axes of each covariance, where noising adds the same variance to all: two
    matrix products and no solve. In the dtype of x; the condition is ignored.
    """

    signal: Tensor
    means: Tensor
    axes: Tensor
    centres: Tensor
    precision: Tensor
    gain: Tensor
    blocks: Tensor
    within: Tensor
    log_share: Tensor

    def __init__(self, mixture: GaussianMixture, schedule: Schedule):
        super().__init__()
        if mixture.means.ndim != 2:
            raise InputError(
                f"a denoiser is of one mixture, means [n, size], not {tuple(mixture.means.shape)}"
            )
        signal = schedule.signal.reshape(-1, 1, 1)
        total = signal.square() * mixture.variances + 1 - signal.square()
        tables = {
            "signal": signal,
            "means": mixture.means,
            "axes": mixture.vectors.movedim(0, 1).flatten(1),
            "centres": torch.einsum("nd,nde->ne", mixture.means, mixture.vectors),
            "precision": 1 / total,
            "gain": signal * mixture.variances / total,
            "blocks": torch.block_diag(*mixture.vectors.mT),
            "within": torch.einsum(
                "kne,nde->knd",
                (1 - signal.square()) * mixture.variances / total,
                mixture.vectors.square(),
            ),
            "log_share": mixture.weights.log() - total.log().sum(-1) / 2,
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        axes = self.axes.to(x.dtype)
        share, error = self._responsibilities(x, level, axes)
        moved = share[..., None] * self.gain.to(x.dtype)[level] * error
        return share @ self.means.to(x.dtype) + moved.flatten(1) @ axes.mT

    def moments(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance of each coordinate of x_0 given x, [batch, size] both, and the
        responsibilities [batch, n].
        """
        share, error = self._responsibilities(x, level, self.axes.to(x.dtype))
        moved = self.gain.to(x.dtype)[level] * error
        shift = moved.flatten(1) @ self.blocks.to(x.dtype)  # every component's, side by side
        means = self.means.to(x.dtype) + shift.reshape_as(moved)
        mean = (share[..., None] * means).sum(1)
        spread = self.within.to(x.dtype)[level] + (means - mean[:, None]).square()
        return mean, (share[..., None] * spread).sum(1), share

    def _responsibilities(self, x: Tensor, level: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
        error = (x @ axes).unflatten(-1, self.centres.shape)
        error = error - self.signal.to(x.dtype)[level] * self.centres.to(x.dtype)
        terms = self.precision.to(x.dtype)[level] * error.square()
        return (self.log_share.to(x.dtype)[level] - terms.sum(-1) / 2).softmax(-1), error


class MixtureSteps(nn.Module):
    """The exact mean and variance of x[k-1] given x[k], per coordinate, for data from a mixture.

    A denoiser whose steps are as wide as the true ones at each point, up to their shape. With one
    spread a level instead, 25 modes nine standard deviations apart need 50 levels for what this has
    at 20.
    """

    between: Tensor
    weight_x0: Tensor
    std: Tensor

    def __init__(self, denoiser: MixtureDenoiser, diffusion: GaussianDiffusion):
        super().__init__()
        self.denoiser = denoiser
        schedule = Schedule(diffusion.signal.flatten())
        between = torch.cat([torch.zeros(1), small_spread(schedule, floor=0.0)]).reshape(-1, 1)
        for name, table in {
            "between": between.square(),
            "weight_x0": diffusion.weight_x0.flatten(1),
            "std": diffusion.std.flatten(1),
        }.items():
            self.register_buffer(name, table, persistent=False)

    def moments(self, x: Tensor, level: Tensor) -> tuple[ScaledPrediction, Tensor, Tensor]:
        """The prediction, the standard deviation of x_0 given x [batch, size], and the
        responsibilities [batch, n].
        """
        x0, variance, share = self.denoiser.moments(x, level)
        weight, between = self.weight_x0.to(x.dtype)[level], self.between.to(x.dtype)[level]
        exact = weight.square() * variance + between
        log_scale = exact.log() / 2 - self.std.to(x.dtype)[level].log()
        return ScaledPrediction(x0, log_scale), variance.sqrt(), share

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> ScaledPrediction:
        return self.moments(x, level)[0]


def gaussian_log_prob(error: Tensor, covariance: Tensor) -> Tensor:
    """log N(error; 0, covariance), nats: [...] for errors [..., m] and covariances [..., m, m]."""
    factor = torch.linalg.cholesky(covariance)
    whitened = torch.linalg.solve_triangular(factor, error[..., None], upper=False).squeeze(-1)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -whitened.square().sum(-1) / 2 - log_det - math.log(2 * math.pi) * error.shape[-1] / 2
