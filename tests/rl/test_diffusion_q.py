"""Diffusion-QL against what is known: its losses, gradients through the chain, bandits, resume."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from kills import assert_same_stage, checkpoint_often, killed_at
from torch import Tensor, nn

from rtb_rl.core import GaussianDiffusion, Sampler
from rtb_rl.core.gaussian import small_spread
from rtb_rl.core.schedules import log_snr_schedule, zero_terminal_signal
from rtb_rl.errors import InputError
from rtb_rl.rl import load_dataset
from rtb_rl.rl.critics.twin_q import TwinQ
from rtb_rl.rl.data.dataset import Transitions
from rtb_rl.rl.peers.diffusion_q import (
    DiffusionQ,
    DiffusionQSettings,
    denoising_loss,
    fit_diffusion_q,
    load_diffusion_q,
    normalised_q_loss,
)
from rtb_rl.rl.peers.diffusion_q_policy import DiffusionQPolicy, choose, draw_actions
from rtb_rl.rl.posteriors.prior import ActionDiffusion, ActionNetwork
from rtb_rl.training import Pretrainer, PretrainSettings, generator_for

SMALL = ActionNetwork(levels=5, width=32, blocks=1)


def copy_of(generator: torch.Generator) -> torch.Generator:
    return torch.Generator().set_state(generator.get_state())


def trainer_for(critic: Any = None, action_size: int = 1, **settings: Any) -> DiffusionQ:
    """Of random weights everywhere: the last layer of a new denoiser is zero."""
    generator = generator_for(0, "networks")
    actor = ActionDiffusion(2, action_size, SMALL, generator=generator)
    for parameter in actor.denoiser.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    critic = critic or TwinQ(2, action_size, width=16, depth=3, generator=generator)
    chosen = DiffusionQSettings(network=SMALL, **settings)
    return DiffusionQ(actor, critic, chosen, generator=generator)


def random_batch(rows: int = 32, action_size: int = 1) -> Transitions:
    generator = generator_for(1, "batch")

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator)

    ends = torch.rand(rows, generator=generator) < 0.5
    return Transitions(normal(2), normal(action_size).tanh(), normal(), normal(2), ends)


def gradients(trainer: DiffusionQ) -> Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.actor_parameters if p.grad is not None])


def test_without_q_the_step_is_that_of_the_prior_s_pretraining() -> None:
    batch = random_batch()
    trainer = trainer_for(eta=0.0, gradient_clip=1e9)
    denoiser = copy.deepcopy(trainer.actor.denoiser)
    pretrainer = Pretrainer(
        trainer.actor.diffusion,
        denoiser,
        lambda n, *, generator: (batch.actions, batch.observations),
        PretrainSettings(batch=32),
        generator=copy_of(trainer.generator),
    )
    expected = pretrainer.update(0)["prior/loss"]
    metrics = trainer.improve_policy(batch)
    assert torch.equal(metrics["dql/denoising_loss"], expected)
    theirs = torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients(trainer), theirs)
    assert float(theirs.abs().max()) > 1e-3


def test_draws_of_the_chain_are_those_of_the_sampler() -> None:
    actor = trainer_for(action_size=2).actor

    def clipped(x, level, condition):
        return actor.denoiser(x, level, condition).clamp(-1, 1)

    observations = torch.randn(50, 2, generator=generator_for(0, "o"))
    sampler = Sampler(actor.diffusion, clipped)
    expected = sampler.sample(observations, 1, generator=generator_for(2, "draw"))[:, 0]
    found = draw_actions(
        actor.diffusion, actor.denoiser, observations, generator=generator_for(2, "draw")
    )
    assert (expected.abs() > 1).any()
    torch.testing.assert_close(found, expected.clamp(-1, 1))


def test_the_gradient_through_the_chain_is_that_of_differences() -> None:
    schedule = zero_terminal_signal(log_snr_schedule(5))
    spread = small_spread(schedule, floor=0.02)
    diffusion = GaussianDiffusion(schedule, (2,), spread, dtype=torch.float64)
    observations = torch.rand(20, 2, generator=generator_for(0, "o"), dtype=torch.float64)

    def value(theta: Tensor) -> Tensor:
        draws = draw_actions(
            diffusion,
            lambda x, level, condition: torch.sin(theta * (x + observations + level[:, None])),
            observations,
            generator=generator_for(3, "draw"),
        )
        return draws.square().sum()

    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(value(theta), theta)
    h = 1e-6
    difference = (value(theta.detach() + h) - value(theta.detach() - h)) / (2 * h)
    assert float(slope) == pytest.approx(float(difference), rel=1e-5)
    assert abs(float(slope)) > 0.1


def test_the_q_loss_of_two_rows_by_hand() -> None:
    q = torch.tensor([[3.0, -1.0], [2.0, 6.0]], requires_grad=True)
    found = {
        float(normalised_q_loss(q, generator=generator_for(i, "q")).detach()) for i in range(20)
    }
    assert found == {-1.0 / 4.0, -4.0 / 2.0}  # -mean of one over the mean absolute of the other


def test_the_policy_s_gradient_does_not_depend_on_the_scale_of_q() -> None:
    found = []
    for factor in (1.0, 7.0):
        trainer = trainer_for(eta=3.0, gradient_clip=1e9)
        for parameter in (trainer.critic.network.weights[-1], trainer.critic.network.biases[-1]):
            parameter.data.mul_(factor)
        trainer.improve_policy(random_batch())
        found.append(gradients(trainer))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    imitation = trainer_for(eta=0.0, gradient_clip=1e9)
    imitation.improve_policy(random_batch())
    assert float((gradients(imitation) - found[0]).norm()) > 0.01 * float(found[0].norm())


@pytest.mark.parametrize("backup_actions", [1, 4])
def test_the_regression_target_row_by_row(backup_actions: int) -> None:
    """No bootstrap after a terminal step; each target Q's best action, then the lesser Q."""
    trainer = trainer_for(backup_actions=backup_actions, discount=0.8, action_size=2)
    generator, batch = generator_for(4, "weights"), random_batch(action_size=2)
    for parameter in trainer.critic.target.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    for parameter in trainer.average.module.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    each = batch.next_observations.repeat_interleave(backup_actions, 0)
    draws = draw_actions(
        trainer.actor.diffusion,
        trainer.average.module,
        each,
        generator=copy_of(trainer.generator),
    )
    q = trainer.critic.target(torch.cat([each, draws], 1)).mean(1, keepdim=True)
    trainer.critic.target.biases[-1].data.sub_(q)  # so that neither is the lesser throughout
    found = trainer.regression_target(batch)
    for row in range(32):
        best = []
        for member in range(2):
            inputs = torch.cat([each, draws], 1)[row * backup_actions : (row + 1) * backup_actions]
            best.append(float(trainer.critic.target(inputs)[member].max()))
        value = 0.0 if batch.terminated[row] else 0.8 * min(best)
        assert float(found[row]) == pytest.approx(float(batch.rewards[row]) + value, abs=1e-5)
    assert not found.requires_grad


class KnownQ(nn.Module):
    """Q = 1 - |a - 0.6|, twice."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(1, 1)

    def both(self, observation, action):
        q = 1 - (action - 0.6).abs().sum(1)
        return torch.stack([q, q])

    def q(self, observation, action):
        return self.both(observation, action)[0]


def bandit_draws(eta: float) -> Tensor:
    """Draws after training on one state, whose actions are N(-0.3, 0.2^2)."""
    trainer = trainer_for(KnownQ(), eta=eta, learning_rate=2e-3)
    generator = generator_for(5, "bandit")
    action = -0.3 + 0.2 * torch.randn(2000, 1, generator=generator)
    s, zero = torch.zeros(128, 2), torch.zeros(128)
    for _ in range(400):
        rows = torch.randint(2000, (128,), generator=generator)
        trainer.improve_policy(Transitions(s, action[rows], zero, s, zero > 0))
    model, states = (trainer.actor.diffusion, trainer.actor.denoiser), torch.zeros(4000, 2)
    return draw_actions(*model, states, generator=generator).detach()


def std_of_draws(diffusion: GaussianDiffusion, std: float) -> float:
    """Of the chain with the best denoiser of N(mean, std^2), which is linear: 0.12 for 0.2."""
    variance = 1.0
    for k in range(diffusion.levels, 0, -1):
        signal, noise = float(diffusion.signal[k]), float(diffusion.noise[k])
        slope = std**2 * signal / (std**2 * signal**2 + noise**2)  # of E[x0 | x] in x
        slope = float(diffusion.weight_x0[k]) * slope + float(diffusion.weight_x[k])
        variance = slope**2 * variance + float(diffusion.std[k]) ** 2
    return variance**0.5


def test_a_bandit_with_known_q_moves_from_the_data_to_the_best_action() -> None:
    """The data's E[Q] is 0.1, to which no weight of Q keeps; the most of Q, 1, is at 0.6."""
    draws = {eta: bandit_draws(eta) for eta in (0.0, 0.3, 10.0)}
    q = {eta: float(KnownQ().q(a, a).mean()) for eta, a in draws.items()}
    assert q[0.0] == pytest.approx(0.1, abs=0.03)
    expected = std_of_draws(trainer_for().actor.diffusion, 0.2)
    assert float(draws[0.0].std()) == pytest.approx(expected, abs=0.02)
    assert q[0.0] + 0.05 < q[0.3] < q[10.0] - 0.05
    assert q[10.0] > 0.9 and float(draws[10.0].mean()) == pytest.approx(0.6, abs=0.06)


def test_candidates_are_chosen_with_the_probabilities_of_the_softmax() -> None:
    q, n = torch.tensor([0.3, -1.2, 0.9, 0.0]), 20_000
    chosen = choose(q.expand(n, 4), 1.5, generator=generator_for(0, "choice"))
    expected = n * (1.5 * q).softmax(0)
    chi_square = ((chosen.bincount(minlength=4) - expected).square() / expected).sum()
    assert float(chi_square) < 16.3  # the 0.999 quantile of three degrees of freedom


def test_acting_keeps_one_of_the_candidates_in_the_environment_s_units() -> None:
    trainer = trainer_for()
    observations = torch.randn(6, 2, generator=generator_for(0, "o"))
    each = observations.repeat_interleave(9, 0)
    model = trainer.actor.diffusion, trainer.actor.denoiser
    draws = draw_actions(*model, each, generator=generator_for(1, "act")).reshape(6, 9)
    best = KnownQ().q(each, draws.reshape(-1, 1)).reshape(6, 9).argmax(1)
    policy = DiffusionQPolicy(
        *model,
        KnownQ(),
        candidates=9,
        beta=1e6,
        action_low=torch.tensor([-3.0]),
        action_high=torch.tensor([1.0]),
    )
    actions = policy.act(observations, generator=generator_for(1, "act"))
    torch.testing.assert_close(actions[:, 0], 2 * draws[torch.arange(6), best].detach() - 1)


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
    checkpoint_often(monkeypatch, log_every=3, checkpoint_every=4)
    settings = DiffusionQSettings(steps=14, batch=16, network=SMALL, candidates=5)
    seen, data = [], short_episodes()
    whole = fit_diffusion_q(
        tmp_path / "whole", data, settings, seed=4, watch=lambda *point: seen.append(point[:2])
    )
    assert seen == [(done, 14) for done in range(1, 15)]
    with killed_at(monkeypatch, 12):
        fit_diffusion_q(tmp_path / "cut", data, settings, seed=4)
    fit_diffusion_q(tmp_path / "cut", data, settings, seed=4)
    assert_same_stage(tmp_path / "whole", tmp_path / "cut")
    observations = torch.randn(7, 2, generator=generator_for(0, "o"))
    acts = [
        policy.act(observations, generator=generator_for(0, "act"))
        for policy in (whole, load_diffusion_q(tmp_path / "cut"))
    ]
    assert torch.equal(*acts) and float(acts[0].abs().max()) <= 2


def test_target_and_average_follow() -> None:
    trainer = trainer_for(polyak=0.25, average_every=2)
    batch = random_batch()

    def copies(module: nn.Module) -> list[Tensor]:
        return [p.detach().clone() for p in module.parameters()]

    for step in range(4):
        target, average = copies(trainer.critic.target), copies(trainer.average.module)
        trainer.update(step, batch)
        moved = zip(target, copies(trainer.critic.network), strict=True)
        expected = [old + 0.25 * (new - old) for old, new in moved]
        torch.testing.assert_close(copies(trainer.critic.target), expected)
        now = copies(trainer.average.module)
        same = all(torch.equal(a, b) for a, b in zip(average, now, strict=True))
        assert same == (step % 2 == 0)


def test_settings_out_of_range_are_refused() -> None:
    wrong: dict[str, Any] = dict(candidates=0, backup_actions=0, average_every=0, eta=-1.0)
    for name, value in wrong.items():
        with pytest.raises(InputError, match=f"{name}={value}"):
            DiffusionQSettings(**{name: value})


def test_the_loss_is_a_mean_over_rows_at_random_levels() -> None:
    """Zero for a denoiser that knows the data, 0.01 E[1 / noise^2] for one that is off by 0.1."""
    actor = trainer_for().actor
    diffusion, actions = actor.diffusion, random_batch(4000).actions
    exact = denoising_loss(
        diffusion,
        lambda x, level, condition: actions,
        actions,
        actions,
        generator=generator_for(0, "l"),
    )
    off = denoising_loss(
        diffusion,
        lambda x, level, condition: actions + 0.1,
        actions,
        actions,
        generator=generator_for(0, "l"),
    )
    weights = diffusion.noise.flatten()[1:].double().square().reciprocal()
    assert float(exact) == 0 and float(off) == pytest.approx(0.01 * float(weights.mean()), rel=0.1)
