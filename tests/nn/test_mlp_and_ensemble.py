"""Networks on vectors: devices and corner cases."""

import pytest
import torch

from rtb_rl.nn import MLP, EnsembleMLP, ResidualMLP


class OnMeta(torch.Generator):
    """Stands in for a generator of another device than the CPU."""

    device = torch.device("meta")


@pytest.mark.parametrize(
    "make",
    [
        lambda g: MLP(3, 1, width=4, generator=g),
        lambda g: ResidualMLP(2, 4, condition_size=3, width=4, generator=g),
    ],
)
def test_all_of_a_network_is_on_the_device_of_its_generator(make):
    network = make(OnMeta())
    held = [*network.parameters(), *network.buffers()]
    assert {tensor.device.type for tensor in held} == {"meta"}


def test_gradients_of_a_linear_ensemble_have_a_row_a_point():
    ensemble = EnsembleMLP(3, 1, members=2, depth=0, generator=torch.Generator().manual_seed(0))
    values, slope = ensemble.input_gradient(torch.zeros(5, 3))
    assert values.shape == (2, 5) and slope.shape == (2, 5, 3)
