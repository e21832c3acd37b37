"""Network calls are counted where they happen, at the price of what they do."""

import torch
from torch import nn

from rtb_rl.training import NetworkCalls


def test_a_row_counts_once_and_thrice_where_its_gradient_is_kept():
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    calls = NetworkCalls([one])
    with torch.no_grad():
        one(torch.zeros(5, 3))
        other(torch.zeros(7, 3))
    assert calls.total == 5
    one(torch.zeros(2, 3)).sum().backward()
    assert calls.total == 5 + 3 * 2


def test_a_network_given_twice_is_counted_once():
    network = nn.Linear(3, 3)
    calls = NetworkCalls({network, network})
    with torch.no_grad():
        network(torch.zeros(4, 3))
    assert calls.total == 4


def test_the_count_stops_and_comes_back_from_a_checkpoint():
    network = nn.Linear(3, 3)
    calls = NetworkCalls([network])
    with torch.no_grad():
        network(torch.zeros(4, 3))
        calls.stop()
        network(torch.zeros(4, 3))
    again = NetworkCalls([network])
    again.load_state_dict(calls.state_dict())
    with torch.no_grad():
        network(torch.zeros(1, 3))
    assert (calls.total, again.total) == (4, 5)
