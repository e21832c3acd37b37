"""Which transitions a recording holds, worked out by hand, and what is refused."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import assume, given
from hypothesis import strategies as st

from rtb_rl.errors import InputError
from rtb_rl.rl.data.dataset import TransitionDataset, check_spaces


def arrays(terminals: str, timeouts: str, **more) -> dict[str, np.ndarray]:
    """Rows numbered by their observations, actions in [-0.9, 0.9], flags as strings of 0 and 1."""
    rows = len(terminals)
    return {
        "observations": np.arange(rows, dtype=np.float32).reshape(rows, 1).repeat(2, axis=1),
        "actions": np.linspace(-0.9, 0.9, rows, dtype=np.float32).reshape(rows, 1),
        "rewards": np.arange(rows, dtype=np.float32) + 1,
        "terminals": np.array([flag == "1" for flag in terminals]),
        "timeouts": np.array([flag == "1" for flag in timeouts]),
        **more,
    }


def dataset_of(terminals: str, timeouts: str, **more) -> TransitionDataset:
    return TransitionDataset.from_arrays(arrays(terminals, timeouts, **more), name="own")


def steps(dataset: TransitionDataset) -> list[tuple[int, int]]:
    """(row, row of the next observation) of every transition."""
    return list(
        zip(
            dataset.observations[:, 0].int().tolist(),
            dataset.next_observations[:, 0].int().tolist(),
            strict=True,
        )
    )


def test_rows_follow_each_other_inside_episodes_only():
    """Episodes 0-1 (terminal), 2-4 (cut), 5-6 (unfinished): rows 4 and 6 lack a successor."""
    dataset = dataset_of("0100000", "0000100")
    assert steps(dataset) == [(0, 1), (1, 1), (2, 3), (3, 4), (5, 6)]
    assert dataset.terminated.tolist() == [False, True, False, False, False]
    assert not dataset.truncated.any()
    assert "2 of 7 transitions dropped" in dataset.notes[0]
    assert dataset.episode_returns().tolist() == [3, 12]


def test_next_observations_keep_cut_rows_and_bootstrap_them():
    following = np.arange(10, 17, dtype=np.float32).reshape(7, 1).repeat(2, axis=1)
    dataset = dataset_of("0100000", "0000100", next_observations=following)
    assert steps(dataset) == [(row, row + 10) for row in range(7)]
    assert dataset.truncated.tolist() == [False] * 4 + [True] + [False] * 2
    assert not dataset.terminated[4]
    assert dataset.notes == ()


@pytest.mark.parametrize("last", [True, False])
def test_final_observations_are_the_successors_of_last_rows(last):
    final = np.array([[90, 90], [91, 91], [92, 92]][: 3 if last else 2], np.float32)
    dataset = dataset_of("0100000", "0000100", **{"infos/final_observations": final})
    expected = [(0, 1), (1, 90), (2, 3), (3, 4), (4, 91), (5, 6)]
    assert steps(dataset) == expected + ([(6, 92)] if last else [])


def test_terminal_wins_over_timeout():
    dataset = dataset_of("010", "010")
    assert dataset.terminated.tolist() == [False, True]
    assert dataset.truncated.tolist() == [False, False]


@given(st.lists(st.sampled_from(["none", "terminal", "timeout", "both"]), min_size=2, max_size=40))
def test_no_next_observation_is_of_another_episode(ends):
    terminals = "".join(str(int(end in {"terminal", "both"})) for end in ends)
    timeouts = "".join(str(int(end in {"timeout", "both"})) for end in ends)
    followed = sum(end == "none" for end in ends[:-1])
    assume(set(ends) != {"none"} and followed + terminals.count("1") >= 2)
    dataset = dataset_of(terminals, timeouts)
    for row, following in steps(dataset):
        ended = ends[row] != "none"
        assert following == (row if ended else row + 1)
        assert not ended or terminals[row] == "1"
    kept = {row for row, _ in steps(dataset)}
    assert {row for row, flag in enumerate(terminals) if flag == "1"} <= kept


def test_flags_and_rewards_of_one_column_are_flattened():
    given_arrays = arrays("001", "000")
    for key in ("rewards", "terminals", "timeouts"):
        given_arrays[key] = given_arrays[key].reshape(-1, 1).astype(np.uint8)
    dataset = TransitionDataset.from_arrays(given_arrays, name="own")
    assert dataset.rewards.shape == dataset.terminated.shape == (3,)
    assert dataset.terminated.dtype == dataset.truncated.dtype == torch.bool


def test_the_names_of_gymnasium_and_minari_are_understood():
    given_arrays = arrays("01", "00")
    given_arrays["terminated"] = given_arrays.pop("terminals")
    given_arrays["truncations"] = given_arrays.pop("timeouts")
    assert len(TransitionDataset.from_arrays(given_arrays, name="own")) == 2


def test_actions_are_rescaled_from_their_box():
    more = {"actions": np.array([[-2.0, 0.0], [0.0, 5.0], [2.0, 10.0]], np.float32)}
    dataset = TransitionDataset.from_arrays(
        arrays("001", "000", **more), name="own", action_box=([-2.0, 0.0], [2.0, 10.0])
    )
    assert dataset.actions.tolist() == [[-1, -1], [0, 0], [1, 1]]
    assert dataset.action_low.tolist() == [-2, 0]
    assert dataset.action_high.tolist() == [2, 10]
    assert dataset.notes == ("actions rescaled from [[-2.0, 0.0], [2.0, 10.0]] to [-1, 1]",)


def test_actions_outside_the_box_are_refused_unless_clipped():
    more = {"actions": np.array([[0.5], [-5.2], [1.5]], np.float32)}
    with pytest.raises(InputError, match=r"2 rows.*\[-1, 1\].*4\.2 .*row 1.*clip_actions=True"):
        dataset_of("001", "000", **more)
    dataset = TransitionDataset.from_arrays(
        arrays("001", "000", **more), name="own", clip_actions=True
    )
    assert dataset.actions.flatten().tolist() == [0.5, -1, 1]
    assert "actions of 2 rows clipped" in dataset.notes[0]


def test_rounding_beyond_the_box_is_clipped_and_said():
    more = {"actions": np.array([[0.5], [1.00001]], np.float32)}
    dataset = dataset_of("01", "00", **more)
    assert dataset.actions.max() == 1
    assert "clipped" in dataset.notes[0]


def test_what_was_given_is_not_shared():
    given_arrays = arrays("001", "000")
    dataset = TransitionDataset.from_arrays(given_arrays, name="own")
    for array in given_arrays.values():
        array[:] = 0
    assert dataset.rewards.tolist() == [1, 2, 3]
    assert dataset.terminated.tolist() == [False, False, True]


def bad(**more):
    return {**arrays("001", "000"), **more}


NAN = np.array([[0, 0], [0, np.nan], [np.inf, 0]], np.float32)


@pytest.mark.parametrize(
    ("given_arrays", "message"),
    [
        ({"observations": NAN}, "missing 'actions', 'rewards', 'terminals', 'timeouts'"),
        (bad(rewards=np.zeros(4)), "observations 3, actions 3, rewards 4"),
        (bad(next_observations=np.zeros((2, 2))), "next_observations 2"),
        (bad(next_observations=np.zeros((3, 5))), "5 numbers a row, 'observations' 2"),
        (bad(observations=np.zeros(3)), r"'observations' has shape \(3,\)"),
        (bad(observations=np.zeros((3, 2, 2))), r"'observations' has shape \(3, 2, 2\)"),
        (bad(rewards=np.zeros((3, 2))), r"'rewards' has shape \(3, 2\)"),
        (bad(observations=NAN), "'observations' holds NaN or infinite values in 2 rows.*row 1"),
        (bad(rewards=np.array([0, 0, 1e300])), "'rewards' holds NaN or infinite.*1 rows.*row 2"),
        (bad(actions=np.array([[0], [1], [2]])), "int64; only continuous actions"),
        (bad(rewards=np.array(["a", "b", "c"])), "'rewards' holds <U1, not numbers"),
        (bad(terminals=np.array([0, 0, 2])), "'terminals' .* other than 0 and 1"),
        (bad(terminals=np.zeros(3, bool)), "no episode ends in 3 rows.*'timeouts'"),
        (
            {key: value[:0] for key, value in arrays("1", "0").items()},
            "all arrays have 0 rows",
        ),
        (
            bad(**{"infos/final_observations": np.zeros((2, 2))}),
            "has 2 rows for 1 episodes",
        ),
        (arrays("1", "0"), "there is one transition, which has no spread"),
        (arrays("0", "1"), "no transition has a known next observation"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_bad_arrays_are_refused(given_arrays, message):
    with pytest.raises(InputError, match=message):
        TransitionDataset.from_arrays(given_arrays, name="own")


@pytest.mark.parametrize("box", [(-np.inf, np.inf), (1.0, 1.0), (1.0, -1.0), (np.nan, 1.0)])
def test_a_box_without_extent_or_end_is_refused(box):
    with pytest.raises(InputError, match="give finite low < high"):
        TransitionDataset.from_arrays(arrays("01", "00"), name="own", action_box=box)


def test_samples_are_uniform_rows_that_belong_together():
    dataset = dataset_of("00010", "00000")
    batch = dataset.sample(40_000, generator=torch.Generator().manual_seed(0))
    rows = batch.observations[:, 0].long()
    counts = rows.bincount(minlength=4) / 40_000
    torch.testing.assert_close(counts, torch.full((4,), 0.25), atol=0.01, rtol=0)
    for name in ("actions", "rewards", "next_observations", "terminated"):
        assert torch.equal(getattr(batch, name), getattr(dataset, name)[rows])


def test_samples_are_a_function_of_the_generator():
    dataset = dataset_of("00010", "00000")
    first, again = (dataset.sample(9, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.observations, again.observations)


def test_scaled_rewards_leave_the_returns_as_recorded():
    dataset = dataset_of("0101", "0000")
    scaled = dataset.with_rewards(dataset.rewards * 10)
    assert scaled.rewards.tolist() == [10, 20, 30, 40]
    assert dataset.rewards.tolist() == [1, 2, 3, 4]
    assert scaled.episode_returns().tolist() == dataset.episode_returns().tolist() == [3, 7]
    with pytest.raises(InputError, match=r"shape \(2,\), transitions are 4"):
        dataset.with_rewards(torch.zeros(2))


def test_to_moves_every_tensor():
    moved = dataset_of("01", "00").to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_the_digest_depends_on_every_array():
    digest = dataset_of("001", "000").sha256
    assert digest == dataset_of("001", "000").sha256
    changed = [
        dataset_of("101", "000"),
        dataset_of("001", "100"),
        dataset_of("001", "000", rewards=np.zeros(3)),
    ]
    assert len({digest, *(other.sha256 for other in changed)}) == 4


BOX = spaces.Box(-1, 1, (1,))
SEEN = spaces.Box(-np.inf, np.inf, (2,))


def test_spaces_that_fit_are_accepted():
    check_spaces(dataset_of("01", "00"), SEEN, BOX)
    parts = spaces.Dict({"a": spaces.Box(0, 1, (1,)), "b": spaces.Box(0, 1, (1,))})
    check_spaces(dataset_of("01", "00"), parts, BOX)


@pytest.mark.parametrize(
    ("observed", "actions", "message"),
    [
        (spaces.Box(-1, 1, (11,)), BOX, "observes 11 numbers.*'own' holds 2"),
        (SEEN, spaces.Box(-1, 1, (3,)), r"Box\(-1.0, 1.0, \(3,\).*holds 1 continuous"),
        (SEEN, spaces.Discrete(4), r"Discrete\(4\).*holds 1 continuous"),
        (SEEN, spaces.Box(-2, 2, (1,)), r"\[-2, 2\], data set 'own' was read with \[-1, 1\]"),
    ],
)
def test_spaces_that_do_not_fit_are_refused(observed, actions, message):
    with pytest.raises(InputError, match=message):
        check_spaces(dataset_of("01", "00"), observed, actions)
