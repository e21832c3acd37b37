"""Conditions of the three kinds are handled alike."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rtb_rl.core import conditions

ROWS = torch.arange(12.0).reshape(4, 3)
KINDS = {"tensor": ROWS, "dict": {"a": ROWS, "b": -ROWS[:, 0]}}


def first(condition) -> Tensor:
    return condition if isinstance(condition, Tensor) else condition["a"]


def test_no_condition_stays_none():
    assert conditions.repeat(None, 3) is None
    assert conditions.take(None, slice(2)) is None
    assert conditions.move(None, "cpu") is None
    assert conditions.concatenate([None, None]) is None
    assert conditions.count(None) is None


@pytest.mark.parametrize("kind", KINDS)
def test_repeat_puts_copies_of_a_row_next_to_each_other(kind):
    repeated = first(conditions.repeat(KINDS[kind], 2))
    assert torch.equal(repeated, ROWS[[0, 0, 1, 1, 2, 2, 3, 3]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [torch.tensor([3, 0, 0]), slice(1, 3)])
def test_take(kind, index):
    taken = conditions.take(KINDS[kind], index)
    assert torch.equal(first(taken), ROWS[index])
    if isinstance(taken, dict):
        assert torch.equal(taken["b"], -ROWS[index][:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_count_and_kind(kind):
    assert conditions.count(KINDS[kind]) == 4
    assert type(conditions.move(KINDS[kind], "cpu")) is type(KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@given(cut=st.integers(1, 3), times=st.integers(1, 4))
def test_cutting_and_concatenating_gives_the_rows_back(kind, cut, times):
    whole = conditions.repeat(KINDS[kind], times)
    middle = cut * times
    parts = [conditions.take(whole, slice(middle)), conditions.take(whole, slice(middle, None))]
    assert torch.equal(first(conditions.concatenate(parts)), first(whole))


@pytest.mark.parametrize("kind", KINDS)
@given(size=st.integers(1, 6))
def test_split_gives_every_row_once_and_in_turn(kind, size):
    parts = list(conditions.split(KINDS[kind], 4, size))
    assert torch.equal(first(conditions.concatenate([part for part, _ in parts])), ROWS)
    assert [count for _, count in parts] == [conditions.count(part) for part, _ in parts]
    assert [count for _, count in parts[:-1]] == [size] * (len(parts) - 1)


def test_split_without_condition_or_size():
    assert list(conditions.split(None, 5, 2)) == [(None, 2), (None, 2), (None, 1)]
    ((whole, count),) = conditions.split(ROWS, 4, None)
    assert torch.equal(first(whole), ROWS) and count == 4
    assert list(conditions.split(None, 0, None)) == []
    with pytest.raises(ValueError, match="'condition' has 4 rows for 5 paths"):
        list(conditions.split(ROWS, 5, 2))


def test_conditions_of_different_kinds_are_not_concatenated():
    with pytest.raises((TypeError, ValueError)):
        conditions.concatenate([ROWS, None])


def test_rows_of_another_number_are_named():
    conditions.check_rows(None, 3)
    conditions.check_rows({"a": torch.zeros(3, 1), "b": torch.zeros(3)}, 3)
    with pytest.raises(ValueError, match="'b' has 2 rows for 3 paths; give one row a path"):
        conditions.check_rows({"a": torch.zeros(3), "b": torch.zeros(2)}, 3)
    with pytest.raises(ValueError, match="'condition' has 4 rows for 3 paths"):
        conditions.check_rows(torch.zeros(4), 3)
