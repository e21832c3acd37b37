"""The three estimates of log Z: values, first values, gradients, refusals."""

import pytest
import torch
from torch import Tensor, nn

from rtb_rl.core import ConditionalLogZ, GroupMeanLogZ, ScalarLogZ, residual, rtb_loss

LOG_WEIGHT = torch.tensor([1.0, 2.0, 4.0, 9.0, -3.0, 5.0])


class Column(nn.Module):
    """One learned multiple of the condition's first column."""

    def __init__(self, first: float = 0.0):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(first))

    def forward(self, condition: Tensor) -> Tensor:
        return self.slope * condition[:, :1]


CONDITION = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 1.0], [4.0, 1.0], [5.0, 0.0], [6.0, 0.0]])


def test_scalar_starts_at_the_mean_log_weight_and_gets_the_residuals_as_gradient():
    log_z = ScalarLogZ()
    log_z.start_at(LOG_WEIGHT)
    assert log_z.value.item() == LOG_WEIGHT.mean()
    with torch.no_grad():
        log_z.value.add_(0.5)
    delta = residual(log_z(None, LOG_WEIGHT), LOG_WEIGHT)
    (rtb_loss(delta) / 2).backward()
    torch.testing.assert_close(log_z.value.grad, delta.detach().mean())


def test_the_best_scalar_of_a_batch_is_its_mean_log_weight():
    log_z = ScalarLogZ()
    optimiser = torch.optim.SGD(log_z.parameters(), lr=0.5)
    rtb_loss(residual(log_z(None, LOG_WEIGHT), LOG_WEIGHT)).backward()
    optimiser.step()  # one Newton step of a quadratic
    torch.testing.assert_close(log_z.value.detach(), LOG_WEIGHT.mean())


def test_conditional_starts_at_the_mean_with_the_spread_as_its_unit():
    column = Column()
    log_z = ConditionalLogZ(column)
    log_z.start_at(LOG_WEIGHT)
    torch.testing.assert_close(log_z(CONDITION, LOG_WEIGHT), LOG_WEIGHT.mean().expand(6))
    with torch.no_grad():
        column.slope.add_(2.0)
    expected = LOG_WEIGHT.mean() + LOG_WEIGHT.std(correction=0) * 2 * CONDITION[:, 0]
    torch.testing.assert_close(log_z(CONDITION, LOG_WEIGHT), expected)
    rtb_loss(residual(log_z(CONDITION, LOG_WEIGHT), LOG_WEIGHT)).backward()
    assert log_z.offset.grad is not None and column.slope.grad is not None


def test_conditional_unit_is_at_least_one():
    log_z = ConditionalLogZ(Column(1.0))
    log_z.start_at(torch.full((6,), 7.0))
    torch.testing.assert_close(log_z(CONDITION, LOG_WEIGHT), 7 + CONDITION[:, 0])


@pytest.mark.filterwarnings("ignore:std")
def test_conditional_starts_from_a_single_path():
    log_z = ConditionalLogZ(Column())
    log_z.start_at(torch.tensor([7.0]))
    assert log_z(CONDITION[:1], LOG_WEIGHT[:1]).item() == 7.0


@pytest.mark.parametrize("width", [2, 5])
def test_conditional_refuses_a_network_of_another_shape(width: int):
    log_z = ConditionalLogZ(nn.Linear(2, width))
    with pytest.raises(ValueError, match=f"returned {6 * width} values for 6 paths"):
        log_z(CONDITION, LOG_WEIGHT)


def test_group_mean_is_the_mean_over_neighbours():
    values = GroupMeanLogZ(3)(None, LOG_WEIGHT)
    expected = torch.tensor([7 / 3, 7 / 3, 7 / 3, 11 / 3, 11 / 3, 11 / 3])
    torch.testing.assert_close(values, expected)


def test_group_mean_has_no_parameters_and_its_residuals_sum_to_zero_in_each_group():
    log_z = GroupMeanLogZ(2)
    log_z.start_at(LOG_WEIGHT)
    delta = residual(log_z(None, LOG_WEIGHT), LOG_WEIGHT)
    assert not list(log_z.parameters())
    torch.testing.assert_close(delta.reshape(3, 2).sum(1), torch.zeros(3))


@pytest.mark.parametrize("size", [1, 0, -2])
def test_a_group_of_one_is_refused(size: int):
    with pytest.raises(ValueError, match="2 or more"):
        GroupMeanLogZ(size)


def test_groups_must_fill_the_batch():
    with pytest.raises(ValueError, match="6 paths can't be cut into groups of 4"):
        GroupMeanLogZ(4)(None, LOG_WEIGHT)


def test_groups_of_different_conditions_are_not_mixed():
    """Two conditions whose log Z differ by 10: exact within groups, wrong across them."""
    exact = torch.tensor([10.0, 10.0, 0.0, 0.0])
    assert rtb_loss(residual(GroupMeanLogZ(2)(None, exact), exact)) == 0
    mixed = exact[[0, 2, 1, 3]]
    assert rtb_loss(residual(GroupMeanLogZ(2)(None, mixed), mixed)) == 25
