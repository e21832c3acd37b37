"""Two critics are two, whatever their class; one is one, whatever processor rounds its values."""

import pytest
import torch
from torch import nn

from rtb_rl.rl import IQLCritic, SoftCritic, load_dataset
from rtb_rl.rl.critics.identity import critic_fingerprint
from rtb_rl.rl.critics.twin_q import TwinQ
from rtb_rl.training.stage import fingerprint


class Slope:
    def __init__(self, slope):
        self.slope = slope

    def q(self, observation, action):
        return self.slope * action.sum(1) + observation.sin().sum(1)


class WithValue(Slope):
    def v(self, observation):
        return observation.sum(1)


class SlopeModule(nn.Module):
    """A module without a tensor of its own."""

    def __init__(self, slope):
        super().__init__()
        self.q = Slope(slope).q


class Goal(nn.Module):
    """A module with a weight, and with a plain number that its state doesn't hold."""

    def __init__(self, goal, weight=1.0):
        super().__init__()
        self.goal, self.weight = goal, nn.Parameter(torch.tensor(weight))

    def q(self, observation, action):
        return -(self.weight * (action - self.goal)).square().sum(1)


class Cautious(IQLCritic):
    """A network of this package, read in another way."""

    def q(self, observation, action):
        return super().q(observation, action) - 1


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    observations, actions = torch.rand(2, 500, 3, generator=generator).numpy() * 2 - 1
    ends = torch.ones(500, dtype=torch.bool).numpy()
    arrays = dict(observations=observations, actions=actions, rewards=actions[:, 0])
    return load_dataset(dict(**arrays, terminals=ends, timeouts=~ends))


@pytest.mark.parametrize("kind", [Slope, SlopeModule])
def test_objects_of_one_class_are_told_apart_by_their_values(kind, data):
    told = {critic_fingerprint(kind(slope), data) for slope in (5.0, -5.0, 5.05, 0.0)}
    assert len(told) == 4
    assert critic_fingerprint(kind(5.0), data) == critic_fingerprint(kind(5.0), data)


def test_v_counts_as_well(data):
    assert critic_fingerprint(Slope(1.0), data) != critic_fingerprint(WithValue(1.0), data)


@pytest.mark.parametrize("slope", [1.0, 7.3, -1e6, 1e-5])
def test_rounding_makes_no_other_critic(slope, data):
    class Rounded(Slope):
        def q(self, observation, action):
            return super().q(observation, action) * (1 + 1e-7)

    assert critic_fingerprint(Rounded(slope), data) == critic_fingerprint(Slope(slope), data)


def new(kind):
    return kind(3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [IQLCritic, SoftCritic, TwinQ])
def test_a_network_of_this_package_is_known_by_its_weights_as_before(kind, data):
    assert critic_fingerprint(new(kind), data) == fingerprint(new(kind))


def test_a_module_of_one_s_own_is_known_by_its_weights_and_by_what_it_says(data):
    """Only its weights counted: an edited number took over the posterior of the old one."""
    others = Goal(-1.0), Goal(1.0), Goal(1.0, weight=-1.0)
    assert len({critic_fingerprint(critic, data) for critic in others}) == 3
    assert critic_fingerprint(Goal(1.0), data) == critic_fingerprint(Goal(1.0), data)
    assert critic_fingerprint(new(Cautious), data) != critic_fingerprint(new(IQLCritic), data)
