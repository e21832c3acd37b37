"""The average of a network's parameters: its weights, its memory, and what is kept of it."""

import pytest
import torch
from torch import nn

from rtb_rl.training.ema import Average, TrainedState


def half_frozen() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    network[0].requires_grad_(False)
    return network


def test_frozen_parameters_are_shared_and_trained_ones_averaged():
    network = half_frozen()
    average = Average(network, decay=0.5)
    assert average.module[0].weight.data_ptr() == network[0].weight.data_ptr()
    assert average.module[2].weight.data_ptr() != network[2].weight.data_ptr()
    before = network[2].weight.detach().clone()
    with torch.no_grad():
        network[2].weight += 1.0
    average.update(network)  # decay min(0.5, 1 / 10)
    torch.testing.assert_close(average.module[2].weight, before + 0.9)
    assert not any(p.requires_grad for p in average.module[2].parameters())
    assert network[2].weight.requires_grad


def test_a_checkpoint_holds_what_is_trained_and_buffers():
    state = TrainedState(half_frozen()).state_dict()
    assert not any(name.startswith("0.") for name in state)
    assert {"2.weight", "1.running_mean"} <= state.keys()
    average = Average(half_frozen(), decay=0.9)
    assert not any(name.startswith("0.") for name in average.state_dict())
    other = Average(half_frozen(), decay=0.9)
    average.update(half_frozen())
    other.load_state_dict(average.state_dict())
    assert other.updates == 1 and torch.equal(other.module[2].weight, average.module[2].weight)


@pytest.mark.parametrize("change", [{"1.weight": None}, {"more": torch.ones(1)}])
def test_a_state_of_another_module_is_refused(change):
    kept = TrainedState(half_frozen())
    state = {k: v for k, v in {**kept.state_dict(), **change}.items() if v is not None}
    with pytest.raises(KeyError, match="the checkpoint lacks"):
        kept.load_state_dict(state)
