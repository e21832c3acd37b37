"""Scores and aggregates against scipy, enumeration, hand counts and simulated truth."""

import numpy as np
import pytest
from scipy import stats

from rtb_rl.sweep.statistics import (
    COVERAGE,
    DRAWS,
    aggregate_score,
    balanced,
    interquartile_mean,
    mean_score,
    performance_profile,
    probability_of_improvement,
    resampled,
)

RANDOM = np.random.default_rng(3)
RUNS = [RANDOM.normal(centre, 5, size) for centre, size in ((20, 3), (50, 4), (90, 5))]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 27])
def test_interquartile_mean_is_scipys_trimmed_mean(count):
    values = np.random.default_rng(count).normal(size=(6, count))
    assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25, axis=1))


def test_interquartile_mean_by_hand():
    assert interquartile_mean(np.array([100.0, 1, 2, 3, 4, 5, 6, -100])) == 3.5


def test_mean_score_weighs_runs_alike_whatever_their_episodes():
    assert mean_score([np.array([10.0]), np.array([20.0, 20.0, 20.0])]).value == 15.0


def test_mean_score_of_one_seed_resamples_its_episodes():
    episodes = RANDOM.normal(50, 10, 40)
    estimate = mean_score([episodes])
    half = stats.norm.ppf(0.975) * episodes.std() / np.sqrt(40)
    assert estimate.low == pytest.approx(episodes.mean() - half, abs=0.5)
    assert estimate.high == pytest.approx(episodes.mean() + half, abs=0.5)


def test_one_episode_in_all_has_no_interval():
    estimate = mean_score([np.array([3.0])])
    assert (estimate.value, estimate.low, estimate.high) == (3.0, None, None)


def test_seeds_that_differ_widen_the_interval():
    """Ten episodes of one run say less than they seem: runs differ."""
    apart = [np.full(10, 10.0), np.full(10, 90.0)]
    estimate = mean_score(apart)
    assert (estimate.low, estimate.high) == (10.0, 90.0)
    pooled = mean_score([np.concatenate(apart)])
    assert pooled.high - pooled.low < 40


@pytest.mark.parametrize("runs", [3, 10])
def test_coverage_is_what_is_stated(runs):
    random = np.random.default_rng(runs)
    held = 0
    for _ in range(200):
        episodes = [random.normal(random.normal(50, 10), 10, size=20) for _ in range(runs)]
        estimate = mean_score(episodes)
        held += estimate.low <= 50 <= estimate.high
    assert held / 200 == pytest.approx(COVERAGE[runs], abs=0.08)


def test_aggregate_covers_its_expectation():
    """Eight runs a task: close to the nominal 95 %."""
    random = np.random.default_rng(0)
    estimates = [
        aggregate_score([random.normal(centre, 10, size=8) for centre in (20, 50, 80)])
        for _ in range(200)
    ]
    truth = np.mean([estimate.value for estimate in estimates])
    held = np.mean([e.low <= truth <= e.high for e in estimates])
    assert 0.85 <= held <= 0.99


def test_resampling_never_mixes_tasks():
    constant = [np.full(3, 10.0), np.full(5, 70.0)]
    draws = resampled(constant, np.random.default_rng(0))
    assert draws.shape == (DRAWS, 30)
    assert (draws == np.repeat([10.0, 70.0], 15)).all()
    estimate = aggregate_score(constant)
    assert estimate.low == estimate.high == estimate.value


def test_tasks_count_alike_however_many_runs_they_have():
    """An agent without two seeds of the hard task led one with all: 90 against 50."""
    easy, hard = np.full(3, 90.0), np.full(3, 10.0)
    taus = np.array([50.0])
    for few in (hard[:1], hard[:2], hard):
        estimate = aggregate_score([easy, few])
        assert (estimate.value, estimate.low, estimate.high) == (50.0, 50.0, 50.0)
        profile = performance_profile([easy, few], taus)
        assert profile.share == profile.low == profile.high == 0.5


def test_equal_numbers_of_runs_are_taken_as_they_are():
    runs = [np.array([1.0, 5.0, 2.0]), np.array([9.0, 3.0, 4.0])]
    assert balanced(runs).tolist() == [1, 5, 2, 9, 3, 4]


def test_a_single_run_a_task_has_no_interval():
    assert aggregate_score([np.array([1.0]), np.array([2.0])]).low is None
    assert probability_of_improvement([np.array([1.0])], [np.array([2.0])]).low is None


def test_a_side_of_single_runs_gives_no_interval():
    """One seed against three gave 33 (33 to 33): one of the sides was never drawn anew."""
    one, three = [np.array([50.0])] * 3, [np.array([49.0, 51.0, 48.0])] * 3
    for pair in ((one, three), (three, one)):
        assert probability_of_improvement(*pair).low is None


def test_profile_by_hand():
    runs = [np.array([10.0, 20.0]), np.array([30.0, 40.0])]
    taus = np.array([5.0, 10.0, 25.0, 35.0, 40.0])
    profile = performance_profile(runs, taus)
    assert profile.share.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    # the tasks lie apart, so at 25 exactly one half lies above in every draw
    assert profile.low.tolist() == [1.0, 0.5, 0.5, 0.0, 0.0]
    assert profile.high.tolist() == [1.0, 1.0, 0.5, 0.5, 0.0]


def test_probability_of_improvement_by_enumeration():
    other = [scores[:3] + 2 for scores in RUNS]
    expected = np.mean(
        [
            np.mean([(x > y) + 0.5 * (x == y) for x in ours for y in theirs])
            for ours, theirs in zip(RUNS, other, strict=True)
        ]
    )
    estimate = probability_of_improvement(RUNS, other)
    assert estimate.value == pytest.approx(expected)
    assert estimate.low <= expected <= estimate.high
    statistic = stats.mannwhitneyu(RUNS[0], other[0]).statistic
    alone = probability_of_improvement(RUNS[:1], other[:1])
    assert alone.value == pytest.approx(statistic / (len(RUNS[0]) * 3))


def test_ties_count_half_and_both_ways_add_to_one():
    same = [np.array([1.0, 1.0]), np.array([2.0, 2.0])]
    assert probability_of_improvement(same, same).value == 0.5
    first, second = [np.array([1.0, 2.0, 3.0])], [np.array([2.0, 5.0])]
    there, back = (probability_of_improvement(*pair) for pair in ((first, second), (second, first)))
    assert there.value == pytest.approx(1.5 / 6) and there.value + back.value == pytest.approx(1)


def test_clearly_better_everywhere_is_certain():
    better = [scores + 100 for scores in RUNS]
    estimate = probability_of_improvement(better, RUNS)
    assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)


def test_intervals_are_the_same_each_time():
    assert aggregate_score(RUNS) == aggregate_score(RUNS)
    assert mean_score(RUNS) == mean_score(RUNS)
    assert probability_of_improvement(RUNS, RUNS) == probability_of_improvement(RUNS, RUNS)
