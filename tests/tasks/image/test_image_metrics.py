"""Metrics against closed forms, enumeration and scipy."""

import math
import sys

import pytest
import torch
from scipy import linalg, stats
from torch.nn import functional

from rtb_rl.errors import InputError
from rtb_rl.tasks.image.metrics import (
    calibration_ranks,
    chi_square_p,
    class_histogram,
    diversity,
    expected_calibration_error,
    frechet_distance,
    inception_features,
    psnr,
    total_variation,
    weighted_diversity,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def test_the_frechet_distance_of_a_shift_and_of_a_stretch():
    features = normal(500, 6)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    shift = torch.arange(6.0, dtype=torch.float64)
    assert frechet_distance(features, features + shift) == pytest.approx(55)
    centred = features - features.mean(0)
    spread = float(centred.square().sum() / 499)  # (3 - 1)^2 of the total variance
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * spread)


def test_the_frechet_distance_with_the_matrix_root_of_scipy():
    a, b = normal(300, 5) @ normal(5, 5, seed=1), normal(200, 5, seed=2) @ normal(5, 5, seed=3)
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = torch.from_numpy(linalg.sqrtm((cov_a @ cov_b).numpy()).real)
    expected = (a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(float(expected))
    assert frechet_distance(a.float(), b.float()) == pytest.approx(float(expected), rel=1e-5)
    assert frechet_distance(b, a) == pytest.approx(float(expected))


def test_fewer_images_than_features_have_a_frechet_distance():
    features = normal(5, 40)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(features, features + 1) == pytest.approx(40, rel=1e-5)


def test_diversity_is_the_mean_over_all_pairs():
    features = normal(30, 4)
    cosines = functional.cosine_similarity(features[:, None], features[None], dim=-1)
    pairs = 1 - cosines[torch.triu(torch.ones(30, 30), 1).bool()]
    assert diversity(features).mean == pytest.approx(float(pairs.mean()))
    assert diversity(torch.ones(5, 3)) == pytest.approx((0, 0), abs=1e-12)
    assert diversity(torch.eye(5)).mean == pytest.approx(1)


def test_weighted_diversity_leaves_out_pairs_of_a_row_with_itself():
    """With weights 2, 1, 1 it is the mean over pairs of different rows, each pair w w'."""
    features = normal(3, 4)
    unit = functional.normalize(features, dim=1)
    distance = 1 - unit @ unit.T
    pairs = 2 * distance[0, 1] + 2 * distance[0, 2] + distance[1, 2]
    log_weight = torch.tensor([2.0, 1.0, 1.0]).log()
    assert weighted_diversity(features, log_weight) == pytest.approx(float(pairs / 5))
    even = weighted_diversity(features, torch.zeros(3))
    assert even == pytest.approx(diversity(features).mean)
    assert weighted_diversity(features, torch.tensor([0.0, -1e3, -1e3])) == 0


def test_the_error_of_diversity_is_its_spread_over_samples():
    offset = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    found = [diversity(normal(100, 3, seed=seed) + offset) for seed in range(300)]
    means = torch.tensor([one.mean for one in found])
    errors = torch.tensor([one.standard_error for one in found])
    assert float(errors.mean()) == pytest.approx(float(means.std()), rel=0.12)


def test_histogram_and_total_variation():
    logits = torch.tensor([[3.0, 1, 0], [0, 1, 0], [5, 1, 2], [0, 0, 9]])
    histogram = class_histogram(logits)
    assert histogram.tolist() == [0.5, 0.25, 0.25]
    assert class_histogram(logits[:1]).tolist() == [1, 0, 0]
    assert total_variation(histogram, torch.tensor([0.25, 0.25, 0.5])) == 0.25
    assert total_variation(histogram, histogram) == 0
    assert total_variation(torch.tensor([1.0, 0]), torch.tensor([0.0, 1])) == 1


def test_psnr_in_decibels():
    x = torch.zeros(2, 1, 4, 4)
    y = torch.stack([torch.full((1, 4, 4), 0.2), torch.full((1, 4, 4), 0.02)])
    assert psnr(x, y).tolist() == pytest.approx([20, 40], abs=1e-4)
    assert psnr(x, y, range=1.0).tolist() == pytest.approx(
        [20 - 20 * math.log10(2), 33.979], abs=1e-3
    )


def logits_of_confidence(confidence):
    return torch.stack([torch.as_tensor(confidence), 1 - torch.as_tensor(confidence)], -1).log()


def test_the_calibration_error_of_known_confidences():
    logits = logits_of_confidence([0.8, 0.8, 0.8, 0.8, 0.6, 0.6])
    labels = torch.tensor([0, 0, 1, 1, 0, 1])  # half right in both bins
    assert expected_calibration_error(logits, labels) == pytest.approx((4 * 0.3 + 2 * 0.1) / 6)
    right = torch.zeros(6, dtype=torch.int64)
    assert expected_calibration_error(logits, right) == pytest.approx((4 * 0.2 + 2 * 0.4) / 6)
    certain = torch.tensor([[50.0, 0.0]]).expand(4, -1)
    assert expected_calibration_error(certain, right[:4]) == pytest.approx(0)


def test_labels_drawn_from_the_classifier_are_calibrated():
    logits = 2 * normal(20_000, 4)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator(1)).squeeze(1)
    assert expected_calibration_error(logits, labels) < 0.015
    assert expected_calibration_error(2 * logits, labels) > 0.1


def conjugate(rows, draws, spread):
    """x ~ N(0, 1), y = x + N(0, 1), posterior N(y / 2, 1 / 2); its spread times `spread`."""
    truth = normal(rows)
    observation = truth + normal(rows, seed=1)
    return truth, observation[:, None] / 2 + spread * 0.5**0.5 * normal(rows, draws, seed=2)


def test_ranks_of_an_exact_posterior_are_uniform_and_of_a_narrow_one_are_not():
    ranks = calibration_ranks(*conjugate(1000, 19, 1.0), generator=generator())
    assert ranks.min() == 0 and ranks.max() == 19
    assert chi_square_p(ranks, 19, bins=10) > 0.01
    for spread in (0.6, 1.6):
        wrong = calibration_ranks(*conjugate(1000, 19, spread), generator=generator())
        assert chi_square_p(wrong, 19, bins=10) < 1e-6


def test_ranks_count_the_draws_below_and_break_ties_at_random():
    truth, draws = torch.tensor([0.5, -9.0, 9.0]), torch.tensor([[0.1, 0.2, 0.9]] * 3)
    assert calibration_ranks(truth, draws, generator=generator()).tolist() == [2, 0, 3]
    ties = calibration_ranks(torch.zeros(4000), torch.zeros(4000, 3), generator=generator())
    assert chi_square_p(ties, 3, bins=4) > 0.01


@pytest.mark.parametrize(("draws", "bins"), [(19, 10), (20, 7), (9, 10)])
def test_the_chi_square_test_is_that_of_scipy(draws, bins):
    ranks = torch.randint(draws + 1, (200,), generator=generator(draws))
    inside = [[v for v in range(draws + 1) if v * bins // (draws + 1) == b] for b in range(bins)]
    found = [sum(int((ranks == value).sum()) for value in values) for values in inside]
    expected = [200 * len(values) / (draws + 1) for values in inside]
    assert chi_square_p(ranks, draws, bins=bins) == pytest.approx(
        stats.chisquare(found, expected).pvalue
    )


def test_the_p_value_is_uniform_where_the_ranks_are():
    values = [
        chi_square_p(torch.randint(20, (400,), generator=generator(seed)), 19, bins=10)
        for seed in range(300)
    ]
    assert stats.kstest(values, "uniform").pvalue > 0.001


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"\(5, 3\) and \(5, 4\) have no Frechet distance"):
        frechet_distance(normal(5, 3), normal(5, 4))
    with pytest.raises(InputError, match="n, m >= 2"):
        frechet_distance(normal(5, 3), normal(1, 3))
    with pytest.raises(InputError, match="diversity needs two rows"):
        diversity(normal(1, 3))
    with pytest.raises(InputError, match=r"on \(2,\) and \(3,\) classes"):
        total_variation(torch.ones(2), torch.ones(3))
    with pytest.raises(InputError, match=r"\(3,\) true values don't go with draws \(2, 5\)"):
        calibration_ranks(torch.ones(3), torch.ones(2, 5), generator=generator())
    with pytest.raises(InputError, match="10 rank values can't fill 11 bins"):
        chi_square_p(torch.zeros(5, dtype=torch.int64), 9, bins=11)


def test_inception_features_name_what_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match="pip install torch-fidelity torchvision"):
        inception_features(torch.zeros(2, 3, 8, 8))
