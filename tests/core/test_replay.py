"""The replay remembers the newest points with what belongs to them, and draws them uniformly."""

import math

import pytest
import torch
from torch import Generator, Tensor

from rtb_rl.core import SampleReplay
from rtb_rl.errors import NonFiniteError


def rows(first: int, count: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    number = torch.arange(first, first + count, dtype=torch.float64)
    return number[:, None].expand(-1, 2), {"state": 10 * number[:, None]}, -number


def contents(replay: SampleReplay) -> list[float]:
    assert replay.log_reward is not None
    return sorted((-replay.log_reward).tolist())


def test_the_oldest_are_forgotten_first():
    replay = SampleReplay(5)
    for first, count, left in ((0, 3, [0, 1, 2]), (3, 4, [2, 3, 4, 5, 6]), (7, 9, range(11, 16))):
        replay.add(*rows(first, count))
        assert contents(replay) == list(left)
        assert len(replay) == len(contents(replay))


def test_what_was_added_together_is_drawn_together():
    replay = SampleReplay(20)
    replay.add(*rows(0, 12))
    replay.add(*rows(12, 12))
    x0, condition, log_reward = replay.sample(50, generator=Generator().manual_seed(0))
    assert isinstance(condition, dict)
    assert x0.shape == (50, 2) and log_reward.shape == (50,)
    assert torch.equal(x0[:, 0], -log_reward)
    assert torch.equal(condition["state"][:, 0], -10 * log_reward)


def test_draws_are_uniform_and_repeatable():
    replay = SampleReplay(10)
    replay.add(*rows(0, 10))
    count = 50_000
    _, _, log_reward = replay.sample(count, generator=Generator().manual_seed(0))
    share = torch.bincount((-log_reward).long(), minlength=10) / count
    assert bool(((share - 0.1).abs() < 4.5 * (0.09 / count) ** 0.5).all())
    again = replay.sample(count, generator=Generator().manual_seed(0))[2]
    assert torch.equal(again, log_reward)


def test_other_kinds_of_condition():
    for condition in (None, rows(0, 3)[0]):
        replay = SampleReplay(4)
        for _ in range(2):
            replay.add(torch.ones(3, 2), condition, -torch.arange(3.0))
        _, drawn, log_reward = replay.sample(7, generator=Generator().manual_seed(0))
        if condition is None:
            assert drawn is None
        else:
            assert isinstance(drawn, Tensor) and torch.equal(drawn[:, 0], -log_reward.double())


def test_no_graph_is_kept():
    replay = SampleReplay(4)
    replay.add(torch.ones(3, 2, requires_grad=True), None, torch.zeros(3, requires_grad=True) + 1)
    x0, _, log_reward = replay.sample(2, generator=Generator().manual_seed(0))
    assert not x0.requires_grad and not log_reward.requires_grad


def test_state_comes_back():
    replay, other = SampleReplay(5), SampleReplay(5)
    replay.add(*rows(0, 7))
    other.load_state_dict(replay.state_dict())
    draws = [r.sample(9, generator=Generator().manual_seed(1)) for r in (replay, other)]
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][2], draws[1][2])


def test_refusals():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        SampleReplay(0)
    with pytest.raises(ValueError, match="nothing has been added"):
        SampleReplay(3).sample(1, generator=Generator())


def test_a_tilted_replay_of_prior_draws_draws_from_the_target():
    """x0 ~ N(0, 1) and log r = x: points in proportion to r are N(1, 1)."""
    generator = Generator().manual_seed(0)
    x0 = torch.randn((50_000, 1), generator=generator, dtype=torch.float64)
    replay = SampleReplay(50_000, tilt=1.0)
    replay.add(x0, None, x0[:, 0])
    drawn = replay.sample(20_000, generator=generator)[0]
    assert float(drawn.mean()) == pytest.approx(1.0, abs=0.03)
    assert float(drawn.var()) == pytest.approx(1.0, abs=0.05)


def test_what_was_saved_on_one_device_goes_to_that_of_the_replay():
    saved = SampleReplay(4)
    saved.add(*rows(0, 3))
    replay = SampleReplay(4, device="meta")
    replay.load_state_dict(saved.state_dict())
    assert isinstance(replay.condition, dict) and replay.x0 is not None
    held = (replay.x0, replay.condition["state"], replay.log_reward)
    assert all(tensor is not None and tensor.device.type == "meta" for tensor in held)
    replay.load_state_dict(SampleReplay(4).state_dict())
    assert len(replay) == 0


def test_one_number_a_point_alone_is_stored():
    with pytest.raises(ValueError, match=r"3 points, 3 conditions and log-rewards \(3, 1\)"):
        SampleReplay(4).add(*rows(0, 3)[:2], torch.zeros(3, 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_no_reward_is_not_stored(bad):
    """A tilted replay would draw its point, or another, for ever."""
    replay = SampleReplay(4)
    with pytest.raises(NonFiniteError, match=f"is {bad} at point 1"):
        replay.add(torch.ones(3, 2), None, torch.tensor([0.0, bad, 0.0]))
    assert len(replay) == 0


def test_with_impossible_points_alone_a_tilted_replay_draws_uniformly():
    replay, x0 = SampleReplay(4, tilt=1.0), torch.arange(4.0)[:, None]
    replay.add(x0, None, torch.full((4,), -torch.inf))
    drawn = replay.sample(4000, generator=Generator().manual_seed(0))[0].long().flatten()
    share = torch.bincount(drawn, minlength=4) / 4000
    assert bool(((share - 0.25).abs() < 4.5 * (0.1875 / 4000) ** 0.5).all())
    replay.add(x0[:2] + 4, None, torch.tensor([0.0, -torch.inf]))
    drawn = replay.sample(100, generator=Generator().manual_seed(0))[0]
    assert drawn.unique().tolist() == [4.0]


@pytest.mark.parametrize("tilt", [-0.5, math.nan, math.inf])
def test_a_tilt_away_from_the_reward_is_refused(tilt):
    with pytest.raises(ValueError, match=f"tilt is {tilt}"):
        SampleReplay(4, tilt=tilt)
