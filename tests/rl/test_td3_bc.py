"""TD3+BC against closed forms: its two losses written out, bandits with known policies, resume."""

import copy

import numpy as np
import pytest
import torch
from kills import assert_same_stage, checkpoint_often, killed_at
from torch import nn

from rtb_rl.errors import InputError
from rtb_rl.rl import load_dataset
from rtb_rl.rl.critics.twin_q import TwinQ
from rtb_rl.rl.data.dataset import Transitions
from rtb_rl.rl.peers.td3_bc import (
    TD3BC,
    DeterministicPolicy,
    TD3BCSettings,
    fit_td3_bc,
    load_td3_bc,
    policy_loss,
)
from rtb_rl.training import generator_for

STATES = torch.eye(3)


def policy_for(observation_size: int, action_size: int = 1) -> DeterministicPolicy:
    box = torch.ones(action_size)
    generator = generator_for(0, "policy")
    return DeterministicPolicy(
        observation_size, action_low=-box, action_high=box, generator=generator
    )


def trainer_for(critic: nn.Module, policy: DeterministicPolicy, **settings) -> TD3BC:
    chosen = TD3BCSettings(**settings)
    return TD3BC(policy, critic, chosen, generator=generator_for(0, "noise"))  # type: ignore[arg-type]


def bandit_batch(rows: int = 240) -> Transitions:
    """Three states, actions around -0.5, 0 and 0.5."""
    generator = generator_for(0, "bandit")
    state = torch.arange(rows) % 3
    action = (state - 1.0) / 2 + 0.2 * torch.randn(rows, generator=generator)
    s = STATES[state]
    ends = torch.ones(rows, dtype=torch.bool)
    return Transitions(s, action[:, None].clamp(-1, 1), torch.zeros(rows), s, ends)


class KnownQ(nn.Module):
    """Q(s, a) = 1 - (a - 0.4)^2, twice, whatever is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(1, 1)

    def both(self, observation, action):
        q = 1 - (action - 0.4).square().sum(1) + 0 * self.network.weight.sum()
        return torch.stack([q, -100 * q])

    def q(self, observation, action):
        return self.both(observation, action).amin(0)

    def follow(self, polyak):
        pass


def test_the_policy_loss_of_two_rows_by_hand() -> None:
    q = torch.tensor([3.0, -1.0], requires_grad=True)
    action = torch.tensor([[0.5, 0.0], [0.0, 0.0]])
    recorded = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    loss = policy_loss(q, action, recorded, alpha=2.5)
    weight = 2.5 / ((3 + 1) / 2)
    assert loss.item() == pytest.approx(-weight * (3 - 1) / 2 + (0.25 + 1) / 4)
    loss.backward()  # the weight is a constant to the gradient
    torch.testing.assert_close(q.grad, torch.full((2,), -weight / 2))


def fixed_point(alpha: float, data_mean: float) -> float:
    """a with weight (a - 0.4) + (a - data mean) = 0, weight = alpha / |1 - (a - 0.4)^2|."""
    a = data_mean
    for _ in range(200):
        weight = alpha / abs(1 - (a - 0.4) ** 2)
        a = (data_mean + weight * 0.4) / (1 + weight)
    return a


@pytest.mark.parametrize("alpha", [0.0, 2.5, 100.0])
def test_a_bandit_is_solved_between_cloning_and_the_maximiser(alpha: float) -> None:
    """alpha 0: the mean action of the state, which least squares gives; 100: the best of Q."""
    batch = bandit_batch()
    rows = [batch.observations[:, i] == 1 for i in range(3)]
    for state, chosen in enumerate(rows):
        one = Transitions(*(getattr(batch, f)[chosen] for f in batch.__dataclass_fields__))
        policy = policy_for(3)
        trainer = trainer_for(KnownQ(), policy, alpha=alpha, learning_rate=2e-3, policy_delay=1)
        for step in range(250):
            trainer.update(step, one)
        action = float(policy(STATES[state : state + 1]).detach())
        expected = fixed_point(alpha, float(one.actions.mean()))
        assert action == pytest.approx(expected, abs=0.01)
        if alpha == 100:
            assert action == pytest.approx(0.4, abs=0.02)


def test_cloning_of_all_states_at_once_is_least_squares() -> None:
    batch, policy = bandit_batch(), policy_for(3)
    trainer = trainer_for(KnownQ(), policy, alpha=0.0, learning_rate=2e-3, policy_delay=1)
    for step in range(300):
        trainer.update(step, batch)
    expected = torch.linalg.lstsq(batch.observations, batch.actions).solution
    torch.testing.assert_close(policy(STATES).detach(), expected, rtol=0, atol=0.01)


def test_the_regression_target_row_by_row() -> None:
    """Clipped noise, clipped action, the lesser target, no bootstrap after a terminal step."""
    generator = generator_for(1, "target")
    policy, critic = policy_for(3, 2), TwinQ(3, 2, width=16, generator=generator)
    trainer = trainer_for(critic, policy, policy_noise=0.9, noise_clip=0.3, discount=0.8)
    for parameter in [*critic.target.parameters(), *trainer.target.parameters()]:
        parameter.data.normal_(std=0.5, generator=generator)
    n = 40
    normal = [torch.randn(n, size, generator=generator) for size in (3, 3, 1)]
    ends = torch.rand(n, generator=generator) < 0.5
    batch = Transitions(normal[0], torch.zeros(n, 2), normal[2][:, 0], normal[1], ends)
    noise = torch.randn(n, 2, generator=copy_of(trainer.generator)) * 0.9
    found = trainer.regression_target(batch)
    clipped = 0
    for row in range(n):
        s = batch.next_observations[row : row + 1]
        a = trainer.target(s)[0] + noise[row].clamp(-0.3, 0.3)
        clipped += int((a.abs() > 1).any())
        a = a.clamp(-1, 1)
        inputs = torch.cat([s, a[None]], 1)
        first, second = critic.target(inputs)[:, 0, 0].tolist()
        expected = float(batch.rewards[row])
        if not ends[row]:
            expected += 0.8 * min(first, second)
        assert float(found[row]) == pytest.approx(expected, abs=1e-5)
    assert clipped and noise.abs().max() > 0.3 and not found.requires_grad


def copy_of(generator: torch.Generator) -> torch.Generator:
    return torch.Generator().set_state(generator.get_state())


@pytest.mark.parametrize(("terminal", "value"), [(True, 1.0), (False, 2.0)])
def test_a_terminal_step_ends_the_return_and_a_cut_one_does_not(terminal, value) -> None:
    """Reward 1, discount 1/2: the return is 1, or 1 + 1/2 + 1/4 + ... = 2."""
    one, end = np.ones((64, 1), np.float32), np.full(64, terminal)
    data = load_dataset(
        dict(
            observations=one,
            actions=0 * one,
            rewards=one[:, 0],
            terminals=end,
            timeouts=~end,
            next_observations=one,
        )
    )
    critic, policy = TwinQ(1, 1, width=16, generator=generator_for(0, "q")), policy_for(1)
    exact = dict(policy_noise=0, discount=0.5, polyak=0.2, learning_rate=3e-3, alpha=0)
    trainer = trainer_for(critic, policy, **exact)
    generator = generator_for(0, "rows")
    for step in range(700):
        trainer.update(step, data.sample(32, generator=generator))
    q = critic.both(torch.ones(1, 1), torch.zeros(1, 1))
    torch.testing.assert_close(q.detach(), torch.full((2, 1), value), rtol=0, atol=0.02)


def test_policy_and_targets_move_on_every_second_step_only() -> None:
    critic, policy = TwinQ(3, 1, width=16, generator=generator_for(0, "q")), policy_for(3)
    trainer = trainer_for(critic, policy, polyak=0.25)

    def parameters(*modules):
        return [p.detach().clone() for module in modules for p in module.parameters()]

    slow, fast = (trainer.target, critic.target), (policy, critic.network)
    before = parameters(*slow), parameters(policy)
    first = trainer.update(0, bandit_batch())
    assert "td3_bc/policy_loss" not in first
    after = parameters(*slow), parameters(policy)
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    trainer.update(1, bandit_batch())
    expected = [a + 0.25 * (b - a) for a, b in zip(before[0], parameters(*fast), strict=True)]
    torch.testing.assert_close(parameters(*slow), expected)
    assert not all(torch.equal(a, b) for a, b in zip(before[1], parameters(policy), strict=True))


def short_episodes(rows: int = 300):
    """Of five steps each."""
    random = np.random.default_rng(0)
    s = random.uniform(-1, 1, (rows, 2)).astype(np.float32)
    a = random.uniform(-2, 2, (rows, 1)).astype(np.float32)
    ends, never = np.arange(rows) % 5 == 4, np.zeros(rows, dtype=bool)
    rewards = -np.square(a[:, 0])
    arrays = dict(observations=s, actions=a, rewards=rewards, terminals=ends, timeouts=never)
    return load_dataset(arrays, action_box=(-2.0, 2.0))


def test_a_killed_run_ends_like_one_that_was_not(tmp_path, monkeypatch) -> None:
    checkpoint_often(monkeypatch, log_every=3, checkpoint_every=5)
    # rates at which whatever a checkpoint lacks is seen
    settings = TD3BCSettings(steps=23, batch=16, polyak=0.3, learning_rate=1e-2)
    data = short_episodes()
    seen = []
    whole = fit_td3_bc(
        tmp_path / "whole", data, settings, seed=4, watch=lambda *point: seen.append(point[:2])
    )
    assert seen == [(done, 23) for done in range(1, 24)]
    with killed_at(monkeypatch, 15):
        fit_td3_bc(tmp_path / "cut", data, settings, seed=4)
    fit_td3_bc(tmp_path / "cut", data, settings, seed=4)
    assert_same_stage(tmp_path / "whole", tmp_path / "cut")
    observations = torch.randn(7, 2, generator=generator_for(0, "o"))
    acts = [
        p.act(observations, generator=generator_for(0, "act"))
        for p in (whole, load_td3_bc(tmp_path / "cut"))
    ]
    assert torch.equal(*acts)
    expected = 2 * whole(observations)  # the box is [-2, 2]
    torch.testing.assert_close(acts[0], expected.detach())


def test_settings_out_of_range_and_directories_without_a_stage_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="alpha=-1"):
        TD3BCSettings(alpha=-1)
    with pytest.raises(InputError, match="policy_delay=0"):
        TD3BCSettings(policy_delay=0)
    with pytest.raises(InputError, match="no fitted stage"):
        load_td3_bc(tmp_path)


def test_a_copied_target_has_no_part_in_the_gradient() -> None:
    critic, policy = TwinQ(3, 1, width=16, generator=generator_for(0, "q")), policy_for(3)
    trainer = trainer_for(critic, policy)
    kept = copy.deepcopy(critic.network.state_dict())
    trainer._improve_policy(bandit_batch())
    for name, value in critic.network.state_dict().items():
        assert torch.equal(value, kept[name])
    assert all(p.grad is None for p in critic.network.parameters())
