"""How far draws are from a Gaussian mixture: its mode weights and the shape of its modes."""

import torch
from torch import Tensor

from rtb_rl.tasks.toy.mixture import GaussianMixture


def weight_error(x0: Tensor, posterior: GaussianMixture) -> dict[str, float]:
    """ "tv": total variation between mode weights found and exact, mean over rows.

    A draw counts for each mode by its responsibility, not for the nearest: only so do exact draws
    give the exact weights on average where modes overlap. n draws of m modes still leave a TV of
    about 0.4 sqrt(m / n).
    """
    found = posterior.log_responsibilities(x0).exp().mean(-2)
    return {"tv": float((found - posterior.weights).abs().sum(-1).mean() / 2)}


def mode_errors(x0: Tensor, posterior: GaussianMixture) -> dict[str, float]:
    """For modes far apart with one covariance sigma^2 I: counts of the nearest mode, and its shape.

    "tv": total variation of mode frequencies, modes of weight zero included; "outside": share of
    draws beyond 3 sigma of every mode (exp(-9/2) = 0.011 for exact draws in two dimensions);
    "variance_ratio": mean squared distance from the nearest mode over the exact one.
    """
    nearest = posterior.nearest(x0)
    counts = torch.nn.functional.one_hot(nearest, posterior.weights.shape[-1])
    found = counts.double().mean(-2)
    centre = posterior.means.take_along_dim(nearest[..., None], -2)
    squared = (x0.double() - centre).square().sum(-1) / posterior.variances[0, 0]
    return {
        "tv": float((found - posterior.weights).abs().sum(-1).mean() / 2),
        "outside": float((squared > 9).double().mean()),
        "variance_ratio": float(squared.mean() / posterior.size),
    }
