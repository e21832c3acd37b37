"""Implicit Q-learning against expectiles and a chain whose values are known."""

import copy

import pytest
import torch
from torch import Tensor

from rtb_rl.errors import InputError
from rtb_rl.rl.critics.critic import IQLCritic
from rtb_rl.rl.critics.iql import IQL, expectile_loss
from rtb_rl.rl.data.dataset import Transitions


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_batch(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Transitions:
    def normal(*shape: int) -> Tensor:
        return torch.randn(32, *shape, generator=generator, dtype=dtype)

    ends = torch.rand(32, generator=generator) < 0.3
    return Transitions(normal(3), normal(2).tanh(), normal(), normal(3), ends)


def minimiser(samples: Tensor, expectile: float) -> float:
    """argmin over m of expectile_loss(samples - m), by bisection on the sign of its slope."""
    low, high = float(samples.min()), float(samples.max())
    for _ in range(50):
        middle = torch.tensor((low + high) / 2, dtype=samples.dtype, requires_grad=True)
        (slope,) = torch.autograd.grad(expectile_loss(samples - middle, expectile), middle)
        low, high = (low, float(middle.detach())) if slope > 0 else (float(middle.detach()), high)
    return low


def test_expectile_of_known_samples() -> None:
    samples = torch.tensor([-3.0, 0.5, 2.0, 9.0], dtype=torch.float64)
    assert minimiser(samples, 0.5) == pytest.approx(2.125)
    assert minimiser(samples, 1 - 1e-6) == pytest.approx(9.0, abs=1e-4)
    assert minimiser(samples, 1e-6) == pytest.approx(-3.0, abs=1e-4)
    coin = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for expectile in (0.1, 0.7, 0.9):
        assert minimiser(coin, expectile) == pytest.approx(expectile)


# A chain of three states. Action 1 moves right, -1 left; right of the last state it ends with
# reward 1. Staying at the left end pays 0.1. The data never goes left from the last state.
NUM_STATES, DISCOUNT = 3, 0.8
STEPS = [(0, -1), (0, -1), (0, 1), (1, -1), (1, 1), (1, 1), (2, 1), (2, 1), (2, 1)]


def outcome(state: int, action: int) -> tuple[float, int, bool]:
    """Reward, next state, whether terminal."""
    if action > 0:
        return float(state == NUM_STATES - 1), min(state + 1, NUM_STATES - 1), state == 2
    return (0.1 if state == 0 else 0.0), max(state - 1, 0), False


def chain_batch() -> Transitions:
    states, actions = zip(*STEPS, strict=True)
    rewards, following, terminated = zip(*(outcome(*step) for step in STEPS), strict=True)
    one_hot = torch.eye(NUM_STATES)
    return Transitions(
        one_hot[list(states)],
        torch.tensor(actions, dtype=torch.float32)[:, None],
        torch.tensor(rewards),
        one_hot[list(following)],
        torch.tensor(terminated),
    )


def backup(step: tuple[int, int], values: list[float]) -> float:
    reward, following, terminal = outcome(*step)
    return reward + (0.0 if terminal else DISCOUNT * values[following])


def exact_expectile(samples: list[float], expectile: float) -> float:
    """The weighted mean of the samples whose weights it defines."""
    mean = sum(samples) / len(samples)
    for _ in range(20):
        weights = [expectile if x > mean else 1 - expectile for x in samples]
        mean = sum(w * x for w, x in zip(weights, samples, strict=True)) / sum(weights)
    return mean


def exact_values(expectile: float) -> list[float]:
    """Fixed point of V(s) = expectile over the data's actions of r + discount V(s')."""
    values = [0.0] * NUM_STATES
    for _ in range(100):
        samples = [[backup(step, values) for step in STEPS if step[0] == s] for s in range(3)]
        values = [exact_expectile(q, expectile) for q in samples]
    return values


def sarsa_values() -> list[float]:
    """V of the behaviour policy from the linear system (1 - discount P) V = r."""
    transition, reward = torch.zeros(3, 3).double(), torch.zeros(3).double()
    for state, action in STEPS:
        count = sum(step[0] == state for step in STEPS)
        gain, following, terminal = outcome(state, action)
        reward[state] += gain / count
        transition[state, following] += (not terminal) / count
    return torch.linalg.solve(torch.eye(3).double() - DISCOUNT * transition, reward).tolist()


def in_sample_optimal_values() -> list[float]:
    values = [0.0] * NUM_STATES
    for _ in range(200):
        values = [max(backup(step, values) for step in STEPS if step[0] == s) for s in range(3)]
    return values


def train_on_chain(expectile: float, **options) -> tuple[Tensor, Tensor]:
    """V of the states and Q of STEPS."""
    critic = IQLCritic(NUM_STATES, 1, width=32, depth=1, generator=seeded(), **options)
    iql = IQL(critic, discount=DISCOUNT, expectile=expectile, polyak=0.05, learning_rate=4e-3)
    batch = chain_batch()
    for _ in range(1500):
        iql.update(batch)
    with torch.no_grad():
        return critic.v(torch.eye(NUM_STATES)), critic.q(batch.observations, batch.actions)


@pytest.mark.parametrize("expectile", [0.5, 0.9])
def test_values_of_the_chain_are_the_expectile_fixed_point(expectile: float) -> None:
    values = exact_values(expectile)
    v, q = train_on_chain(expectile)
    torch.testing.assert_close(v, torch.tensor(values), rtol=0, atol=0.01)
    expected = torch.tensor([backup(step, values) for step in STEPS])
    torch.testing.assert_close(q, expected, rtol=0, atol=0.01)
    if expectile == 0.5:
        assert values == pytest.approx(sarsa_values(), abs=1e-8)


def test_expectile_near_one_reaches_the_in_sample_optimum() -> None:
    v, q = train_on_chain(0.99, members=4, layer_norm=True)
    values = in_sample_optimal_values()
    assert values == pytest.approx([0.64, 0.8, 1.0])
    torch.testing.assert_close(v, torch.tensor(values), rtol=0, atol=0.025)
    expected = torch.tensor([backup(step, values) for step in STEPS])
    torch.testing.assert_close(q, expected, rtol=0, atol=0.025)


@pytest.mark.parametrize(("terminated", "value"), [(True, 1.0), (False, 2.0)])
def test_a_terminal_step_ends_the_return_and_a_cut_one_does_not(terminated, value: float) -> None:
    """One state, reward 1, discount 1/2: the return is 1, or 1 + 1/2 + 1/4 + ... = 2."""
    critic = IQLCritic(1, 1, width=16, depth=1, generator=seeded())
    iql = IQL(critic, discount=0.5, polyak=0.1, learning_rate=1e-2)
    one = torch.ones(1, 1)
    for _ in range(500):
        iql.update(Transitions(one, one, torch.ones(1), one, torch.tensor([terminated])))
    assert critic.q(one, one).item() == pytest.approx(value, abs=0.01)


def test_losses_are_those_of_the_paper() -> None:
    """The metrics at the parameters before the step, written out row by row."""
    generator = seeded()
    critic = IQLCritic(3, 2, members=3, width=16, generator=generator)
    iql = IQL(critic, discount=0.9, expectile=0.8)
    for parameter in iql.target.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    before, batch = copy.deepcopy(critic), random_batch(generator)
    inputs = torch.cat([batch.observations, batch.actions], 1)
    with torch.no_grad():
        target_q = iql.target(inputs)[..., 0].min(0).values
        next_v, v = before.v(batch.next_observations), before.v(batch.observations)
        q = before.q_network(inputs)[..., 0]
    metrics = iql.update(batch)
    v_loss = q_loss = 0.0
    for row in range(32):
        advantage = float(target_q[row] - v[row])
        v_loss += (0.8 if advantage > 0 else 0.2) * advantage**2 / 32
        backed_up = batch.rewards[row] + 0.9 * (not batch.terminated[row]) * next_v[row]
        q_loss += float((q[:, row] - backed_up).square().mean()) / 32
    assert float(metrics["critic/v_loss"]) == pytest.approx(v_loss, rel=1e-5)
    assert float(metrics["critic/q_loss"]) == pytest.approx(q_loss, rel=1e-5)
    advantage_mean = float((target_q - v).mean())
    assert float(metrics["critic/advantage_mean"]) == pytest.approx(advantage_mean, rel=1e-4)
    assert not any(metric.requires_grad for metric in metrics.values())


def test_one_update_equals_separate_optimisers_for_every_network() -> None:
    generator = seeded()
    critic = IQLCritic(3, 2, width=16, generator=generator).double()
    iql = IQL(critic, expectile=0.7, learning_rate=1e-2)
    reference = copy.deepcopy(critic)
    batch = random_batch(generator, torch.float64)
    inputs = torch.cat([batch.observations, batch.actions], 1)
    with torch.no_grad():
        target_q = reference.q(batch.observations, batch.actions)
        bootstrap = 0.99 * reference.v(batch.next_observations) * (~batch.terminated)
    backed_up = batch.rewards + bootstrap
    first, second = reference.q_network(inputs)[..., 0]
    losses = {
        reference.v_network: expectile_loss(target_q - reference.v(batch.observations), 0.7),
        reference.q_network: (first - backed_up).square().mean()
        + (second - backed_up).square().mean(),
    }
    for network, loss in losses.items():
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
        loss.backward()
        optimiser.step()
    iql.update(batch)
    for ours, theirs in zip(critic.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_target_moves_by_polyak_towards_the_new_q() -> None:
    generator = seeded()
    critic = IQLCritic(3, 2, width=16, generator=generator)
    iql = IQL(critic, polyak=0.25, learning_rate=1e-2)
    for _ in range(2):
        old = [parameter.clone() for parameter in iql.target.parameters()]
        iql.update(random_batch(generator))
        new = list(critic.q_network.parameters())
        for target, before, online in zip(iql.target.parameters(), old, new, strict=True):
            expected = 0.75 * before + 0.25 * online
            torch.testing.assert_close(target, expected, rtol=0, atol=1e-6)
            assert not torch.equal(before, online)
            assert target.grad is None


def test_resume_is_exact_to_the_bit() -> None:
    generator = seeded()
    batches = [random_batch(generator) for _ in range(8)]
    iql = IQL(IQLCritic(3, 2, width=16, generator=generator))
    iql.critic.standardise(batches[0].observations)
    for batch in batches[:4]:
        iql.update(batch)
    saved = copy.deepcopy(iql.state_dict())
    resumed = IQL(IQLCritic(3, 2, width=16, generator=seeded(9)))
    resumed.load_state_dict(saved)
    for batch in batches[4:]:
        expected, metrics = iql.update(batch), resumed.update(batch)
        assert all(torch.equal(expected[name], metrics[name]) for name in expected)
    torch.testing.assert_close(resumed.state_dict(), iql.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("discount", 1.5),
        ("expectile", 1.0),
        ("expectile", 0.0),
        ("polyak", 0.0),
        ("learning_rate", 0.0),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name}={value}, it needs"):
        IQL(IQLCritic(3, 2, generator=seeded()), **{name: value})
