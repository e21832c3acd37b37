"""Critics backed up over draws of the prior: enumeration, closed fixed points, exact resume."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from kills import assert_same_stage, checkpoint_often, killed_at

from rtb_rl.errors import CheckpointError, InputError
from rtb_rl.rl import ActionDiffusion, ActionNetwork, check_critic, load_dataset
from rtb_rl.rl.data.dataset import Transitions
from rtb_rl.rl.posteriors import prior_actions
from rtb_rl.rl.posteriors.prior_actions import draw_prior_actions, linked_states, own_actions
from rtb_rl.rl.posteriors.soft_backup import (
    BACKUPS,
    least,
    mean_minus_std,
    soft_value,
    softmax_value,
)
from rtb_rl.rl.posteriors.soft_critic import (
    SoftCritic,
    SoftCriticSettings,
    fit_soft_critic,
    load_soft_critic,
)
from rtb_rl.rl.posteriors.soft_q_learning import SoftQLearning
from rtb_rl.training import generator_for

ACTIONS = torch.tensor([[-0.5], [0.5]])
BEHAVIOUR = torch.tensor([0, 0, 0, 1])  # candidates: the first action three times of four


@pytest.mark.parametrize("beta", [0.3, 3.0, 40.0])
def test_a_bandit_by_enumeration(beta) -> None:
    """log E exp(beta Q) / beta and E[exp(beta Q) Q] / E[exp(beta Q)] under known probabilities."""
    probability = torch.tensor([1, 4, 2, 1]).double() / 8
    q = torch.tensor([2.0, -1.0, 0.3, 1.7]).double()
    draws = q.repeat_interleave((8 * probability).long()).expand(3, -1)
    weight = probability * (beta * q).exp()
    soft, mean = weight.sum().log() / beta, (weight * q).sum() / weight.sum()
    torch.testing.assert_close(soft_value(beta)(draws), soft.expand(3))
    torch.testing.assert_close(softmax_value(beta)(draws), mean.expand(3))
    policy = weight / weight.sum()
    kl = (policy * (policy / probability).log()).sum()
    torch.testing.assert_close(soft, mean - kl / beta)  # what a policy near the prior is worth


def test_limits_and_order_of_the_backups() -> None:
    q = torch.randn(200, 16, generator=generator_for(0, "q")).double()
    mean, largest = q.mean(-1), q.amax(-1)
    for backup in BACKUPS.values():
        torch.testing.assert_close(backup(0.0)(q), mean)
        torch.testing.assert_close(backup(1e-6)(q), mean, rtol=0, atol=1e-4)
        torch.testing.assert_close(backup(1e4)(q), largest, rtol=0, atol=math.log(17) / 1e4)
        values = [backup(beta)(q) for beta in (0.1, 1.0, 3.0)]
        for lower, upper in zip([mean, *values], [*values, largest], strict=True):
            assert (lower < upper).all()  # and so both lie between the mean and the largest
    assert (soft_value(1.0)(q) < softmax_value(1.0)(q)).all()


def test_bounds_of_an_ensemble_by_hand() -> None:
    q = torch.tensor([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]])
    std = math.sqrt((9 + 1 + 16) / 3)
    assert torch.equal(least(q), torch.tensor([1.0, 5.0]))
    torch.testing.assert_close(mean_minus_std(0.5)(q), torch.tensor([4 - 0.5 * std, 5.0]))
    torch.testing.assert_close(mean_minus_std(2.0)(q[:1]), q[0])


def trained(
    batch: Transitions, backup, *, discount: float, steps: int = 600, **network
) -> SoftCritic:
    critic = SoftCritic(2, 1, width=32, **network, generator=generator_for(0, "critic"))
    learner = SoftQLearning(
        critic, backup=backup, discount=discount, polyak=0.1, learning_rate=3e-3
    )
    candidates = ACTIONS[BEHAVIOUR].expand(len(batch.rewards), -1, -1)
    for step in range(steps):
        if step == steps * 2 // 3:
            learner.optimiser.param_groups[0]["lr"] = 3e-4
        learner.update(batch, candidates)
    return critic.requires_grad_(False)


@pytest.mark.parametrize("kind", BACKUPS)
def test_a_two_step_chain_by_enumeration(kind) -> None:
    """State 0 leads to state 1, whose action is rewarded and ends the episode."""
    beta, discount = 2.0, 0.9
    one_hot, end = torch.eye(2), torch.tensor([False, False, True, True])
    states, following = one_hot[[0, 0, 1, 1]], one_hot[[1, 1, 0, 0]]
    rewards = torch.tensor([0.1, -0.2, 0.0, 1.0])
    batch = Transitions(states, ACTIONS.repeat(2, 1), rewards, following, end)
    critic = trained(batch, BACKUPS[kind](beta), discount=discount)
    weight = torch.tensor([0.75, 0.25 * math.exp(beta)])
    value = {"soft": weight.sum().log() / beta, "softmax": weight[1] / weight.sum()}[kind]
    expected = rewards + torch.where(end, 0.0, discount * value)
    torch.testing.assert_close(critic.q(states, batch.actions), expected, rtol=0, atol=0.02)
    torch.testing.assert_close(critic.v(one_hot[1:]), value[None], rtol=0, atol=0.02)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("kind", BACKUPS)
def test_the_fixed_point_of_one_state(kind, members) -> None:
    """V = discount V + soft value of r, so V = soft value of r / (1 - discount): both backups
    commute with adding a constant."""
    beta, discount = 3.0, 0.5
    rewards, state = torch.tensor([0.2, 1.0]), torch.ones(2, 2)
    batch = Transitions(state, ACTIONS, rewards, state, torch.zeros(2, dtype=torch.bool))
    bound = mean_minus_std(0.5)  # at the fixed point the members agree
    backup = BACKUPS[kind](beta)
    critic = trained(
        batch, backup, discount=discount, members=members, bound=bound, layer_norm=True
    )
    value = backup(rewards[BEHAVIOUR]) / (1 - discount)
    torch.testing.assert_close(
        critic.q(state, ACTIONS), rewards + discount * value, rtol=0, atol=0.03
    )
    torch.testing.assert_close(critic.v(state[:1]), value[None], rtol=0, atol=0.03)
    check_critic(critic, 2, 1)


def test_slow_copies_are_read_and_terminal_states_teach_v_nothing() -> None:
    critic = SoftCritic(2, 1, width=16, generator=generator_for(0, "critic"))
    learner = SoftQLearning(critic, backup=soft_value(1.0), polyak=0.25, learning_rate=1e-2)
    state, candidates = torch.ones(2, 2), ACTIONS[BEHAVIOUR].expand(2, -1, -1)

    def update(ends: bool) -> None:
        end = torch.full((2,), ends)
        learner.update(Transitions(state, ACTIONS, torch.ones(2), state, end), candidates)

    for ends in (True, False):
        slow = [p.clone() for p in critic.target.parameters()]
        value = critic.v(state).detach()
        update(ends)
        assert torch.equal(critic.v(state), value) == ends
        fast = critic.network.parameters()
        expected = [a + 0.25 * (b.detach() - a) for a, b in zip(slow, fast, strict=True)]
        torch.testing.assert_close(list(critic.target.parameters()), expected)
    inputs = torch.cat([state, ACTIONS], 1)  # nothing is standardised yet
    torch.testing.assert_close(critic.q(state, ACTIONS), critic.target(inputs)[..., 0].amin(0))
    assert not torch.allclose(critic.members(state, ACTIONS).amin(0), critic.q(state, ACTIONS))


def prior_for(observation_size: int = 2, action_size: int = 1) -> ActionDiffusion:
    """Untrained: draws of it depend on nothing but noise, some of it beyond [-1, 1]."""
    network, generator = ActionNetwork(levels=3, width=16, blocks=1), generator_for(0, "prior")
    return ActionDiffusion(observation_size, action_size, network, generator=generator)


def episodes(ends, *, rewards=None, size: int = 2):
    """Episodes of random observations; `ends`: (length, terminal) of each."""
    rows, random = sum(length for length, _ in ends), np.random.default_rng(0)
    last = np.zeros(rows, bool)
    last[np.cumsum([length for length, _ in ends]) - 1] = True
    terminals, timeouts = last.copy(), last.copy()
    terminals[last], timeouts[last] = [end for _, end in ends], [not end for _, end in ends]
    observations = random.standard_normal((rows, size)).astype(np.float32)
    following = np.roll(observations, -1, 0)
    following[last] = random.standard_normal((last.sum(), size))
    return load_dataset(
        dict(
            observations=observations,
            actions=random.uniform(-1, 1, (rows, 1)).astype(np.float32),
            rewards=random.standard_normal(rows) if rewards is None else rewards,
            terminals=terminals,
            timeouts=timeouts,
            next_observations=following,
        )
    )


def test_states_are_listed_once_and_every_next_state_is_found() -> None:
    data = episodes([(4, True), (1, False), (7, True), (3, False)])
    states, following = linked_states(data)
    assert len(states) == 15 + 4
    assert torch.equal(states[:15], data.observations)
    assert torch.equal(states[following], data.next_observations)


@pytest.mark.parametrize(("terminal", "value"), [(True, 1.0), (False, 2.0)])
def test_a_terminal_step_ends_the_return_and_a_cut_one_does_not(
    terminal, value, tmp_path, monkeypatch
) -> None:
    """Reward 1, discount 1/2: the return is 1, or 1 + 1/2 + 1/4 + ... = 2 in every next state."""
    monkeypatch.setattr(
        "rtb_rl.rl.posteriors.soft_critic.scaled_for_critic", lambda data, _: (data, "")
    )
    one, end = np.ones((64, 2), np.float32), np.full(64, terminal)
    arrays = dict(
        observations=one,
        actions=0 * one[:, :1],
        rewards=one[:, 0],
        terminals=end,
        timeouts=~end,
        next_observations=one,
    )
    settings = SoftCriticSettings(
        steps=500, batch=32, discount=0.5, polyak=0.2, learning_rate=3e-3, candidates=4, depth=1
    )
    critic = fit_soft_critic(tmp_path, load_dataset(arrays), prior_for(), settings)
    q = critic.q(torch.ones(1, 2), torch.zeros(1, 1))
    assert float(q) == pytest.approx(value, abs=0.05)


def test_draws_that_were_killed_are_continued_to_the_same_bits(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(prior_actions, "CHUNK", 4)
    data, prior = episodes([(9, True), (5, False)]), prior_for()
    whole = draw_prior_actions(tmp_path / "whole", data, prior, candidates=3, seed=5)
    assert whole.actions.shape == (16, 3, 1)
    assert len(torch.unique(whole.actions)) == 48 and whole.actions.abs().max() > 1
    write, written = prior_actions.replace_file, []

    def dies(path, content):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(prior_actions, "replace_file", dies)
        with pytest.raises(KeyboardInterrupt):
            draw_prior_actions(tmp_path / "cut", data, prior, candidates=3, seed=5)
    kept = [path.stat().st_mtime_ns for path in written]
    again = draw_prior_actions(tmp_path / "cut", data, prior, candidates=3, seed=5)
    assert torch.equal(whole.actions, again.actions)
    assert [path.stat().st_mtime_ns for path in written] == kept
    batch, drawn = again.sample(6, generator=generator_for(0, "rows"))
    place = (again.data.observations[:, None] == batch.observations).all(-1).int().argmax(0)
    assert torch.equal(drawn, again.actions[again.next_state[place]])
    assert torch.equal(batch.rewards, data.rewards[place])
    written[0].write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="00000"):
        draw_prior_actions(tmp_path / "cut", data, prior, candidates=3, seed=5)
    with pytest.raises(InputError, match="candidates"):
        draw_prior_actions(tmp_path / "cut", data, prior, candidates=4, seed=5)


def test_some_rows_of_the_data_are_transitions_of_it(tmp_path) -> None:
    data = episodes([(30, True), (20, False)])
    some = draw_prior_actions(tmp_path, data, prior_for(), candidates=2, rows=12).data
    place = [int((data.observations == row).all(1).nonzero()) for row in some.observations]
    assert len(set(place)) == 12 and place == sorted(place)
    for name in ("actions", "rewards", "next_observations", "terminated", "truncated"):
        assert torch.equal(getattr(some, name), getattr(data, name)[place]), name


def test_values_of_draws_are_those_of_clipped_actions_at_their_observation(tmp_path) -> None:
    class Known:
        def q(self, observation, action):
            return observation[:, 0] + 10 * action[:, 0]

    data = episodes([(9, True), (5, False)])
    draws = draw_prior_actions(tmp_path, data, prior_for(), candidates=3)
    clipped = draws.actions[:14, :, 0].clamp(-1, 1)
    torch.testing.assert_close(draws.values(Known()), data.observations[:, :1] + 10 * clipped)


def test_a_killed_run_ends_like_one_that_was_not(tmp_path, monkeypatch) -> None:
    checkpoint_often(monkeypatch, log_every=3, checkpoint_every=5)
    data, prior = episodes([(40, True), (30, False)]), prior_for()
    settings = SoftCriticSettings(
        steps=23, batch=16, candidates=3, rows=50, lower_bound=1.0, layer_norm=True, beta=2
    )
    whole = fit_soft_critic(tmp_path / "whole", data, prior, settings, seed=4)
    with killed_at(monkeypatch, 15):
        fit_soft_critic(tmp_path / "cut", data, prior, settings, seed=4)
    assert own_actions(tmp_path / "cut").exists()
    fit_soft_critic(tmp_path / "cut", data, prior, settings, seed=4)
    assert not own_actions(tmp_path / "cut").exists()
    assert_same_stage(tmp_path / "whole", tmp_path / "cut")
    loaded = load_soft_critic(tmp_path / "cut")
    assert torch.equal(whole.q(data.observations, data.actions), loaded.q(*inputs(data)))
    assert torch.equal(whole.v(data.observations), loaded.v(data.observations))
    shared = fit_soft_critic(
        tmp_path / "third", data, prior, settings, seed=4, actions=tmp_path / "actions"
    )
    assert torch.equal(whole.q(*inputs(data)), shared.q(*inputs(data)))
    assert (tmp_path / "actions" / "results.json").exists()


def inputs(data):
    return data.observations, data.actions


def test_settings_out_of_range_are_refused() -> None:
    wrong: dict[str, Any] = {"beta": -1, "lower_bound": -0.5, "backup": "max", "candidates": 0}
    for name, value in wrong.items():
        with pytest.raises(InputError, match=rf"{name}.*{value}"):
            SoftCriticSettings(**{name: value})
