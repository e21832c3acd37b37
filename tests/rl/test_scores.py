"""Returns, D4RL's constants, and the two scalings of rewards, worked out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rtb_rl.errors import InputError
from rtb_rl.rl.catalogue import D4RL_TASKS
from rtb_rl.rl.data.dataset import TransitionDataset
from rtb_rl.rl.data.summary import summarise
from rtb_rl.rl.episodes.scores import (
    REFERENCE_RETURNS,
    EpisodeLog,
    antmaze_rewards,
    normalised_score,
    published_return_scale,
    reference_returns,
    return_scale,
)


def log_of(*episodes: tuple[list[float], str], horizon: int | None = None) -> EpisodeLog:
    """A log of episodes given as (rewards, end), end being terminal, timeout, both or none."""
    rewards = np.concatenate([np.array(one, np.float32) for one, _ in episodes])
    flags = {key: np.zeros(len(rewards), bool) for key in ("terminal", "timeout")}
    last = np.cumsum([len(one) for one, _ in episodes]) - 1
    for row, (_, end) in zip(last, episodes, strict=True):
        for key in flags:
            flags[key][row] = end in {key, "both"}
    return EpisodeLog(rewards, flags["terminal"], flags["timeout"], horizon)


class Recorded:
    def __init__(self, log: EpisodeLog):
        self.log = log


@pytest.mark.parametrize(
    ("name", "random", "expert"),
    [
        ("halfcheetah-medium-v2", -280.178953, 12135.0),
        ("hopper-medium-replay", -20.272305, 3234.3),
        ("walker2d-expert-v0", 1.629008, 4592.3),
        ("ant-medium-v2", -325.6, 3879.7),
        ("antmaze-large-play-v2", 0.0, 1.0),
        ("kitchen-mixed-v0", 0.0, 4.0),
        ("pen-human-v1", 96.262799, 3076.8331017826877),
        ("hammer-cloned-v1", -274.856578, 12794.134825156867),
        ("relocate-expert-v0", -6.425911, 4233.877797728884),
        ("door-human", -56.512833, 2880.5693087298737),
        ("maze2d-umaze-v1", 23.85, 161.86),
        ("maze2d-umaze-dense-v1", 68.537689, 193.66285642381482),
        ("maze2d-large-dense-v1", 30.569041, 303.4857382709002),
        ("minigrid-fourrooms-v0", 0.01442, 2.89685),
        ("HalfCheetah-v4", -280.178953, 12135.0),
    ],
)
def test_reference_returns_are_d4rls(name, random, expert):
    assert reference_returns(name) == (random, expert)


def test_every_d4rl_task_has_reference_returns():
    assert all(reference_returns(name) for name in D4RL_TASKS)
    assert len(REFERENCE_RETURNS) == 19


@pytest.mark.parametrize("name", ["mujoco/hopper/medium-v0", "Hopper-v5", "Humanoid-v4", ""])
def test_other_names_have_no_reference_returns(name):
    assert reference_returns(name) is None


def test_normalised_score_of_published_returns():
    reference = reference_returns("halfcheetah")
    assert reference is not None
    assert normalised_score(1933.5386, reference) == pytest.approx(17.83, abs=0.005)
    assert normalised_score(np.array(reference), reference).tolist() == [0, 100]
    assert normalised_score(torch.tensor(reference), reference).tolist() == pytest.approx([0, 100])


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.floats(1, 1e4))
def test_normalised_score_is_affine(value, random, spread):
    reference = (random, random + spread)
    back = random + normalised_score(value, reference) / 100 * (reference[1] - reference[0])
    assert back == pytest.approx(value, abs=1e-6)


def test_references_the_wrong_way_round_are_refused():
    with pytest.raises(InputError, match="expert's must be the larger"):
        normalised_score(1.0, (5.0, 5.0))


def test_returns_and_lengths_follow_the_flags():
    log = log_of(([1, 2], "terminal"), ([4], "timeout"), ([8, 16], "both"), ([32], "none"))
    assert log.returns.tolist() == [3, 4, 24, 32]
    assert log.lengths.tolist() == [2, 1, 2, 1]
    assert log.whole.tolist() == [True, True, True, False]


def test_a_cut_before_the_horizon_is_a_partial_episode():
    log = log_of(([1] * 4, "timeout"), ([1], "timeout"), ([1], "terminal"), horizon=4)
    assert log.whole.tolist() == [True, False, True]


def test_data_of_a_shorter_horizon_counts_its_longest_cut_episodes():
    log = log_of(([1] * 3, "timeout"), ([1] * 2, "timeout"), ([1] * 3, "timeout"), horizon=1000)
    assert log.whole.tolist() == [True, False, True]


def test_return_scale_uses_true_boundaries_and_whole_episodes():
    log = log_of(([3, 3, 4], "timeout"), ([1, 1], "terminal"), ([1000], "none"))
    assert return_scale(Recorded(log)) == pytest.approx(1000 / (10 - 2))


def test_the_published_scale_drifts_over_boundaries():
    """Three cut episodes of 3 steps, window 3: the view lacks rows 2, 5 and 8 (timeouts).

    What is left, 1 1 | 2 2 | 4 4, falls into windows 1 1 2 and 2 4 4: returns 4 and 10.
    The true returns are 3, 6 and 12.
    """
    log = log_of(([1] * 3, "timeout"), ([2] * 3, "timeout"), ([4] * 3, "timeout"))
    assert published_return_scale(Recorded(log), window=3) == pytest.approx(1000 / (10 - 4))
    assert return_scale(Recorded(log)) == pytest.approx(1000 / (12 - 3))


def test_the_published_scale_skips_the_last_row_and_open_windows():
    """The last row, a terminal, is not in the view, so the window before it stays open."""
    log = log_of(([1, 1], "terminal"), ([5], "terminal"), ([7, 7], "terminal"))
    assert published_return_scale(Recorded(log)) == pytest.approx(1000 / (5 - 2))
    assert return_scale(Recorded(log)) == pytest.approx(1000 / (14 - 2))


def test_a_row_that_is_both_terminal_and_timeout_is_not_in_the_published_view():
    log = log_of(([1, 1], "terminal"), ([5, 9], "both"), ([3], "terminal"), ([2, 2], "timeout"))
    # view: 1 1 T | 5 3 T | 2 -> windows 2 and 8; the last 2 (timeout) is out, 2 stays open
    assert published_return_scale(Recorded(log)) == pytest.approx(1000 / (8 - 2))


def test_the_two_scales_agree_where_no_episode_is_cut():
    log = log_of(([1, 2], "terminal"), ([7], "terminal"), ([4, 4], "terminal"), ([0, 0], "none"))
    assert return_scale(Recorded(log)) == published_return_scale(Recorded(log))


def test_equal_returns_have_no_scale():
    log = log_of(([1, 1], "terminal"), ([2], "terminal"))
    assert return_scale(Recorded(log)) is None
    assert published_return_scale(Recorded(log)) is None


def test_antmaze_rewards_are_minus_one_but_at_the_goal():
    assert antmaze_rewards(torch.tensor([0.0, 1.0])).tolist() == [-1, 0]


def test_summary_counts_and_scores():
    dataset = TransitionDataset.from_arrays(
        {
            "observations": np.zeros((5, 2), np.float32),
            "actions": np.array([[1.0], [0.5], [-1.0], [0.0], [0.0]], np.float32),
            "rewards": np.array([100.0, 200, 500, 1, 1], np.float32),
            "terminals": np.array([0, 1, 0, 0, 0], bool),
            "timeouts": np.array([0, 0, 1, 0, 0], bool),
        },
        name="hopper-mine",
    )
    summary = summarise(dataset)
    assert (summary.whole_episodes, summary.partial_episodes) == (2, 1)
    assert summary.returns == (400, 300, 500)
    assert summary.normalised == pytest.approx(100 * 420.272305 / 3254.572305)
    assert summary.lengths == (pytest.approx(5 / 3), 1, 2)
    assert summary.transitions == 3  # the cut row and the last row lack a successor
    assert summary.saturation == pytest.approx(1 / 3)
    assert "normalised 12.9" in str(summary)
    assert "2 of 5 transitions dropped" in summary.lines()[-1]
