"""The Gaussian policy against its density, and advantage weighting against closed forms."""

import copy
import math

import pytest
import torch
from torch import Tensor

from rtb_rl.errors import InputError
from rtb_rl.rl.critics.gaussian_policy import (
    AdvantageWeightedRegression,
    GaussianPolicy,
    MeanActionPolicy,
)
from rtb_rl.rl.data.dataset import Transitions


class Quadratic:
    """q = -(curvature / 2) |a - goal|^2 + offset, v = offset."""

    def __init__(self, curvature: float, goal: float, offset: float = 0.0) -> None:
        self.curvature, self.goal, self.offset = curvature, goal, offset

    def q(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.offset - 0.5 * self.curvature * (action - self.goal).square().sum(1)

    def v(self, observation: Tensor) -> Tensor:
        return torch.full((len(observation),), self.offset)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_policy(seed: int = 0, *, action_size: int = 2, depth: int = 2) -> GaussianPolicy:
    low, high = -torch.ones(action_size), torch.ones(action_size)
    return GaussianPolicy(
        3, action_low=low, action_high=high, width=16, depth=depth, generator=seeded(seed)
    )


def batch_of(observations: Tensor, actions: Tensor) -> Transitions:
    """Steps without reward; the weighting looks at observations and actions only."""
    rewards = torch.zeros(len(actions))
    return Transitions(observations, actions, rewards, observations, rewards.bool())


def random_batch(generator: torch.Generator) -> Transitions:
    observations = torch.randn(32, 3, generator=generator)
    return batch_of(observations, torch.rand(32, 2, generator=generator) * 2 - 1)


def test_log_prob_is_that_of_independent_normals() -> None:
    policy, batch = make_policy(), random_batch(seeded())
    policy.log_std.data = torch.tensor([-1.3, 0.4])
    law = torch.distributions.Normal(policy.mean(batch.observations), policy.log_std.exp())
    expected = law.log_prob(batch.actions).sum(1)
    torch.testing.assert_close(policy.log_prob(batch.observations, batch.actions), expected)


def test_drawn_actions_have_the_mean_and_spread_of_the_law() -> None:
    policy = make_policy()
    policy.log_std.data = torch.tensor([math.log(0.1), math.log(0.02)])
    observation = torch.tensor([[0.1, 0.2, -0.3]])
    mean = policy.mean_action(observation)[0]
    assert float(mean.abs().max()) < 0.6  # so that the box cuts nothing off
    actions = policy.act(observation.expand(20_000, 3), generator=seeded(1))
    torch.testing.assert_close(actions.mean(0), mean, rtol=0, atol=0.003)
    torch.testing.assert_close(actions.std(0), torch.tensor([0.1, 0.02]), rtol=0.03, atol=0)
    again = policy.act(observation.expand(20_000, 3), generator=seeded(1))
    assert torch.equal(actions, again)


def test_actions_fill_the_environments_box_and_do_not_leave_it() -> None:
    low, high = torch.tensor([-2.0, 0.0]), torch.tensor([1.0, 10.0])
    policy = GaussianPolicy(3, action_low=low, action_high=high, width=8, generator=seeded())
    policy.log_std.data.fill_(2.0)
    actions = policy.act(torch.zeros(1000, 3), generator=seeded())
    assert torch.equal(actions.min(0).values, low)
    assert torch.equal(actions.max(0).values, high)
    unit = policy.mean(torch.zeros(1, 3))
    expected = torch.stack([-0.5 + 1.5 * unit[0, 0], 5.0 + 5.0 * unit[0, 1]])[None]
    torch.testing.assert_close(policy.mean_action(torch.zeros(1, 3)), expected)


def test_mean_action_policy_draws_nothing() -> None:
    policy, generator = make_policy(), seeded()
    observations = torch.randn(4, 3, generator=seeded(2))
    state = generator.get_state()
    actions = MeanActionPolicy(policy).act(observations, generator=generator)
    torch.testing.assert_close(actions, policy.mean(observations).detach())
    assert torch.equal(generator.get_state(), state)


def test_standardised_policy_does_not_see_the_units_of_observations() -> None:
    observations = torch.randn(200, 3, generator=seeded())
    policies = [make_policy(4), make_policy(4)]
    policies[0].standardise(observations)
    policies[1].standardise(observations * 50 + 7)
    torch.testing.assert_close(
        policies[0].mean(observations), policies[1].mean(observations * 50 + 7)
    )


def gaussian_quantiles(mean: float, std: float, count: int) -> Tensor:
    """Points [count] that stand for N(mean, std^2) with equal weight."""
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (mean + std * torch.special.ndtri(levels)).float()


def test_advantage_weighting_of_a_gaussian_bandit_gives_the_closed_form() -> None:
    """mu = N(m, s^2), Q - V = -(c/2)(a - g)^2: the weighted law has precision 1/s^2 + beta c."""
    temperature, curvature, goal = 2.5, 10.0, 0.5
    precision = 1 / 0.2**2 + temperature * curvature
    mean = (0.1 / 0.2**2 + temperature * curvature * goal) / precision
    actions = gaussian_quantiles(0.1, 0.2, 2000)[:, None]
    batch = batch_of(torch.ones(2000, 3), actions)
    policy = make_policy(action_size=1, depth=0)
    trainer = AdvantageWeightedRegression(
        policy,
        Quadratic(curvature, goal, offset=300.0),
        temperature=temperature,
        learning_rate=3e-2,
        num_updates=400,
    )
    for _ in range(400):
        metrics = trainer.update(batch)
    assert policy.mean(torch.ones(1, 3)).item() == pytest.approx(mean, abs=2e-3)
    assert policy.log_std.exp().item() == pytest.approx(precision**-0.5, rel=0.01)
    shrink = 0.2**2 * temperature * curvature
    normaliser = math.exp(-0.5 * shrink / (1 + shrink) * (0.1 - goal) ** 2 / 0.2**2)
    normaliser /= math.sqrt(1 + shrink)
    assert float(metrics["policy/weight_mean"]) == pytest.approx(normaliser, rel=0.01)


def test_zero_temperature_is_behaviour_cloning() -> None:
    actions = torch.tensor([[-0.5], [0.1], [0.7], [0.9]])
    policy = make_policy(action_size=1, depth=0)
    trainer = AdvantageWeightedRegression(
        policy, Quadratic(5.0, 0.0), temperature=0.0, learning_rate=3e-2, num_updates=400
    )
    for _ in range(400):
        trainer.update(batch_of(torch.ones(4, 3), actions))
    assert policy.mean(torch.ones(1, 3)).item() == pytest.approx(0.3, abs=2e-3)
    assert policy.log_std.exp().item() == pytest.approx(float(actions.std(correction=0)), rel=0.01)


def test_weights_are_clipped_at_one_hundred() -> None:
    policy, batch = make_policy(), random_batch(seeded())
    log_prob = policy.log_prob(batch.observations, batch.actions).detach()
    rich = Quadratic(0.0, 0.0)
    rich.v = lambda observation: torch.full((32,), -1e6)  # type: ignore[method-assign]
    metrics = AdvantageWeightedRegression(policy, rich).update(batch)
    torch.testing.assert_close(metrics["policy/loss"], -100 * log_prob.mean())
    assert float(metrics["policy/weight_clipped"]) == 1.0


def test_spread_stays_within_its_bounds() -> None:
    policy = make_policy(action_size=1, depth=0)
    trainer = AdvantageWeightedRegression(policy, Quadratic(0.0, 0.0), learning_rate=0.5)
    for _ in range(60):
        trainer.update(batch_of(torch.ones(2, 3), torch.full((2, 1), 0.2)))
        assert -5.0 <= policy.log_std.item() <= 2.0


def test_learning_rate_falls_to_zero_along_a_cosine() -> None:
    trainer = AdvantageWeightedRegression(make_policy(), Quadratic(1.0, 0.0), num_updates=4)
    batch, rates = random_batch(seeded()), []
    for _ in range(6):
        rates.append(trainer.optimiser.param_groups[0]["lr"])
        trainer.update(batch)
    expected = [3e-4 * 0.5 * (1 + math.cos(math.pi * min(step / 4, 1))) for step in range(6)]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_resume_is_exact_to_the_bit() -> None:
    generator, critic = seeded(), Quadratic(1.0, 0.3)
    batches = [random_batch(generator) for _ in range(8)]
    trainer = AdvantageWeightedRegression(make_policy(), critic, num_updates=10)
    trainer.policy.standardise(batches[0].observations)
    for batch in batches[:4]:
        trainer.update(batch)
    saved = copy.deepcopy(trainer.state_dict())
    resumed = AdvantageWeightedRegression(make_policy(7), critic, num_updates=10)
    resumed.load_state_dict(saved)
    for batch in batches[4:]:
        expected, metrics = trainer.update(batch), resumed.update(batch)
        assert all(torch.equal(expected[name], metrics[name]) for name in expected)
    parameters = zip(trainer.policy.parameters(), resumed.policy.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in parameters)


def test_a_critic_without_v_is_refused() -> None:
    class OnlyQ:
        def q(self, observation: Tensor, action: Tensor) -> Tensor:
            return action.sum(1)

    with pytest.raises(InputError, match=r"critic.v\(observation\), OnlyQ has only q; add"):
        AdvantageWeightedRegression(make_policy(), OnlyQ())  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [-1.0, float("inf"), float("nan")])
def test_a_temperature_out_of_range_is_refused(temperature: float) -> None:
    with pytest.raises(InputError, match="needed finite and at least 0"):
        AdvantageWeightedRegression(make_policy(), Quadratic(1.0, 0.0), temperature=temperature)


def test_a_decay_over_no_updates_is_refused() -> None:
    with pytest.raises(InputError, match="num_updates=0, needed at least 1, or None"):
        AdvantageWeightedRegression(make_policy(), Quadratic(1.0, 0.0), num_updates=0)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ([-1.0], [1.0, 1.0], r"action_low has shape \[1\] and action_high \[2\]"),
        ([1.0], [1.0], "must be finite and below"),
        ([-math.inf], [1.0], "must be finite and below"),
    ],
)
def test_a_box_that_is_none_is_refused(low: list, high: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GaussianPolicy(
            3, action_low=torch.tensor(low), action_high=torch.tensor(high), generator=seeded()
        )
