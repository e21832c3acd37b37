"""How near samples are to what they should be, and how calibrated a posterior is."""

from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional

from rtb_rl.errors import InputError


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    standard_error: float


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance of Gaussians fitted to features [n, size] and [m, size].

        |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)

    In float64, with unbiased covariances; roots by symmetric eigendecomposition, so that singular
    covariances (fewer images than features) are no trouble (arXiv 1706.08500 eq. 6). It shrinks
    with the number of images: compare numbers of equal n only.
    """
    for features in (features_a, features_b):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != features_a.shape[1]:
            raise InputError(
                f"features {tuple(features_a.shape)} and {tuple(features_b.shape)} have no Frechet"
                " distance; give [n, size] and [m, size] with n, m >= 2"
            )
    (mean_a, covariance_a), (mean_b, covariance_b) = _moments(features_a), _moments(features_b)
    root = _root(covariance_a)
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    spread = covariance_a.trace() + covariance_b.trace() - 2 * cross
    return float((mean_a - mean_b).square().sum() + spread)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    return features.mean(0), torch.atleast_2d(features.T.cov())


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def inception_features(images: Tensor) -> Tensor:
    """The 2,048 features that published Frechet distances are measured in: [n, 2048].

    `images`: [n, 1 or 3, height, width] in [0, 1]. Needs torch-fidelity and with it torchvision,
    which are no dependencies of this package; InputError where they are missing or broken.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore
            FeatureExtractorInceptionV3,
        )
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"Inception features need torch-fidelity and torchvision ({error}): pip install"
            " torch-fidelity torchvision, of builds that match your torch, or use the features of"
            " a classifier"
        ) from None
    network = FeatureExtractorInceptionV3("inception", ["2048"]).to(images.device).eval()
    pixels = (images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    with torch.no_grad():
        return torch.cat([network(part)[0] for part in pixels.split(100)])


def diversity(features: Tensor) -> Estimate:
    """Mean cosine distance of two different rows of features [n, size], over all pairs.

    From the sum of the unit vectors, without any pair being formed. The standard error is that of
    a U-statistic, from the mean distance of each row to the others: it counts rows, not pairs.
    """
    if features.ndim != 2 or len(features) < 2:
        raise InputError(f"diversity needs two rows [n, size], not {tuple(features.shape)}")
    unit = functional.normalize(features.double(), dim=1)
    count = len(unit)
    of_row = 1 - (unit @ unit.sum(0) - unit.square().sum(1)) / (count - 1)
    return Estimate(float(of_row.mean()), 2 * float(of_row.std()) / count**0.5)


def weighted_diversity(features: Tensor, log_weight: Tensor) -> float:
    """The same of rows with weights: 1 - (|sum w u|^2 - sum w^2) / (1 - sum w^2), u the unit rows.

    Pairs of a row with itself are left out, so that few effective rows make it noisy, not small.
    `log_weight`: [n], nats. Zero where a single row has all the weight.
    """
    unit = functional.normalize(features.double(), dim=1)
    weight = log_weight.double().softmax(0)
    squares = float(weight.square().sum())
    if 1 - squares < 1e-12:
        return 0.0
    return 1 - (float((weight @ unit).square().sum()) - squares) / (1 - squares)


def clustered_error(values: Tensor, source: Tensor | None) -> float | None:
    """The standard error of the mean of values [n], of which those of one `source` hang together.

    By sums over sources: sqrt(G / (G - 1) sum_g (sum_g (v - mean))^2) / n for G of them; for
    candidates that repeat by weight that of weighting and drawing. None where there is one source.
    """
    off = values.double() - values.double().mean()
    if source is not None:
        _, which = source.unique(return_inverse=True)
        off = off.new_zeros(int(which.max()) + 1).index_add(0, which, off)
    count = len(off)
    if count < 2:
        return None
    return float((off.square().sum() * count / (count - 1)).sqrt()) / len(values)


def class_histogram(logits: Tensor) -> Tensor:
    """The share of images whose most probable class is each: float64 [classes]."""
    count = torch.bincount(logits.argmax(-1), minlength=logits.shape[-1])
    return count.double() / len(logits)


def total_variation(p: Tensor, q: Tensor) -> float:
    """sum |p - q| / 2 of two laws on the same classes: 0 for equal ones, 1 for disjoint ones."""
    if p.shape != q.shape:
        raise InputError(
            f"laws on {tuple(p.shape)} and {tuple(q.shape)} classes can't be compared; use the"
            " same classes"
        )
    return float((p.double() - q.double()).abs().sum() / 2)


def psnr(x: Tensor, y: Tensor, *, range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio, 10 log10(range^2 / mean squared error), dB: [batch].

    `range`: from the least to the greatest value possible, 2 in model space.
    """
    error = (x - y).square().flatten(1).mean(1)
    return 10 * (range**2 / error).log10()


def expected_calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Mean |accuracy - confidence| over bins of equal width in confidence, weighted by their share.

    arXiv 1706.04599 eq. 3.
    """
    confidence, predicted = logits.double().softmax(-1).max(-1)
    excess = (predicted == labels).double() - confidence
    index = (confidence * bins).long().clamp(max=bins - 1)
    total = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    return float(total.index_add(0, index, excess).abs().sum() / len(labels))


def calibration_ranks(truth: Tensor, draws: Tensor, *, generator: Generator) -> Tensor:
    """How many posterior draws of a statistic lie below its true value: int64 [n], 0..m.

    `truth`: [n], the statistic of x drawn from the prior; `draws`: [n, m], of x drawn from the
    posterior given the observation of that x. Uniform when the posterior is exact (simulation-based
    calibration, arXiv 1804.06788 theorem 1). Ties are broken at random.
    """
    if draws.ndim != 2 or truth.shape != draws.shape[:1]:
        raise InputError(
            f"{tuple(truth.shape)} true values don't go with draws {tuple(draws.shape)}; give [n]"
            " and [n, m]"
        )
    below = (draws < truth[:, None]).sum(1)
    ties = (draws == truth[:, None]).sum(1)
    uniform = torch.rand(truth.shape, generator=generator, device=truth.device, dtype=torch.float64)
    return below + (uniform * (ties + 1)).long().clamp(max=ties)


def chi_square_p(ranks: Tensor, draws: int, *, bins: int) -> float:
    """P(chi^2 >= that of the ranks) if they are uniform on 0..draws; Pearson's test.

    `bins` at most draws + 1; one that holds more rank values expects more ranks. At least five
    expected ranks a bin make the law of chi^2 a good approximation.
    """
    if not 2 <= bins <= draws + 1:
        raise InputError(f"{draws + 1} rank values can't fill {bins} bins; use 2 to {draws + 1}")
    values = torch.arange(draws + 1, device=ranks.device) * bins // (draws + 1)
    share = torch.bincount(values, minlength=bins).double() / (draws + 1)
    found = torch.bincount(ranks * bins // (draws + 1), minlength=bins).double()
    expected = share * len(ranks)
    statistic = ((found - expected).square() / expected).sum()
    degrees = torch.tensor((bins - 1) / 2, dtype=torch.float64, device=ranks.device)
    return float(torch.special.gammaincc(degrees, statistic / 2))
