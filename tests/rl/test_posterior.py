"""The offline-RL path from data to posterior, against what is known of the answer."""

import json

import numpy as np
import pytest
import torch

from rtb_rl.core import ConditionalLogZ
from rtb_rl.errors import InputError
from rtb_rl.nn import MLP
from rtb_rl.rl import (
    ActionNetwork,
    DiffusionPolicy,
    PosteriorSettings,
    fit_posterior,
    fit_prior,
    load_dataset,
    offline_rl_task,
)
from rtb_rl.rl.posteriors.posterior import posterior_model
from rtb_rl.rl.posteriors.prior import ActionDiffusion
from rtb_rl.training import Finetuner, FinetuneSettings, Mix, PretrainSettings, generator_for

SMALL = ActionNetwork(levels=6, width=32, blocks=1)
SHORT = FinetuneSettings(updates=12, beta_warmup=4, conditions=16)


def one_step_data(rows=400, seed=0):
    random = np.random.default_rng(seed)
    s = random.uniform(-1, 1, (rows, 1)).astype(np.float32)
    a = np.clip(0.5 * s + 0.2 * random.standard_normal((rows, 2)), -1, 1).astype(np.float32)
    ends = np.ones(rows, dtype=bool)
    rewards = a.sum(1)
    arrays = dict(observations=s, actions=a, rewards=rewards, terminals=ends, timeouts=~ends)
    return load_dataset(arrays)


class Quadratic:
    """Q = -|a - goal|^2 / 2, times a factor."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def q(self, observation, action):
        return -self.factor * (action - 0.5).square().sum(1) / 2


class Zero:
    def q(self, observation, action):
        return torch.zeros(len(observation))


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prior")
    return fit_prior(directory, one_step_data(), PretrainSettings(steps=150, batch=64), SMALL)


def first_metrics(prior, critic, beta):
    data = one_step_data()
    posterior = posterior_model(prior, critic, langevin=False)
    task = offline_rl_task(data, prior.diffusion, prior.denoiser, posterior.denoiser, critic)
    log_z = ConditionalLogZ(MLP(1, 1, width=8, generator=generator_for(0, "z")))
    settings = FinetuneSettings(beta=beta, beta_warmup=1, conditions=32)
    finetuner = Finetuner(task, log_z, settings, generator=generator_for(0, "f"))
    return finetuner.update(0)


def test_mistake_3_without_reward_the_posterior_is_the_prior_to_the_bit(prior, tmp_path):
    """Published: a tanh Jacobian in the reward moves the mean action even where Q = 0."""
    posterior = fit_posterior(
        tmp_path, one_step_data(), prior, Zero(), PosteriorSettings(SHORT, diagnostic_rows=4)
    )
    observations = torch.linspace(-1, 1, 5)[:, None]
    draws = [
        model.sampler.sample(observations, 50, generator=torch.Generator().manual_seed(1))
        for model in (prior, posterior)
    ]
    assert torch.equal(*draws)
    found = json.loads((tmp_path / "results.json").read_text())["diagnostics"]
    assert found["kl"] == 0.0 and found["log_z"] == 0.0 and found["ess"] == pytest.approx(1.0)


@pytest.mark.parametrize("levels", [2, 5, 10, 75])
def test_mistake_4_the_schedule_reaches_noise_at_any_number_of_levels(levels):
    """Published: 75 levels keep signal 0.674, and N(0, I) is not the start of their chain."""
    model = ActionDiffusion(
        3, 2, ActionNetwork(levels=levels, width=8), generator=torch.Generator().manual_seed(0)
    )
    assert model.diffusion.signal_left == 0.0
    x0 = torch.ones((4000, 2))
    path = model.diffusion.noise_path(x0, generator=torch.Generator().manual_seed(0))
    assert path[-1].mean().abs() < 5 / 8000**0.5


def test_mistake_5_beta_multiplies_the_critic_and_nothing_else(prior):
    """Published: the temperature multiplies the log-ratio in one place and the reward in
    another.
    """
    one = first_metrics(prior, Quadratic(2.0), beta=3.0)
    other = first_metrics(prior, Quadratic(6.0), beta=1.0)
    assert float(one["rtb/loss"]) == pytest.approx(float(other["rtb/loss"]), rel=1e-5)
    doubled = first_metrics(prior, Quadratic(2.0), beta=6.0)
    assert float(doubled["rtb/residual_std"]) == pytest.approx(
        2 * float(one["rtb/residual_std"]), rel=1e-4
    )


def test_mistake_2_data_actions_carry_their_own_reward_in_the_rl_path(prior):
    """One state with two actions: replacing Q by a constant must change the off-policy loss."""
    data = one_step_data()

    def loss(critic):
        posterior = posterior_model(prior, critic, langevin=False)
        task = offline_rl_task(data, prior.diffusion, prior.denoiser, posterior.denoiser, critic)
        log_z = ConditionalLogZ(MLP(1, 1, width=8, generator=generator_for(0, "z")))
        settings = FinetuneSettings(beta_warmup=1, conditions=32, mix=Mix(on_policy=0, data=1))
        return float(
            Finetuner(task, log_z, settings, generator=generator_for(0, "f")).update(0)["rtb/loss"]
        )

    assert loss(Zero()) == 0.0
    assert loss(Quadratic()) > 1e-3


def test_the_critic_sees_clipped_actions(prior):
    seen = []

    class Watching(Quadratic):
        def q(self, observation, action):
            seen.append(action.abs().max())
            return super().q(observation, action)

    first_metrics(prior, Watching(), beta=1.0)
    assert max(seen) <= 1.0


@pytest.mark.parametrize("langevin", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_variant_starts_at_the_prior_and_resumes(prior, tmp_path, langevin, grouped):
    settings = PosteriorSettings(
        SHORT, langevin=langevin, grouped_log_z=grouped, huber_threshold=5.0, diagnostic_rows=4
    )
    model = posterior_model(prior, Quadratic(), langevin=langevin)
    observations = torch.zeros((3, 1))
    x, level = (
        torch.randn((3, 2), generator=torch.Generator().manual_seed(0)),
        torch.tensor([1, 3, 6]),
    )
    assert torch.equal(
        model.denoiser(x, level, observations).x0, prior.denoiser(x, level, observations)
    )
    fitted = fit_posterior(tmp_path, one_step_data(), prior, Quadratic(), settings)
    again = fit_posterior(tmp_path, one_step_data(), prior, Quadratic(), settings)
    moved = model.state_dict()
    for name, value in fitted.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert any(not torch.equal(value, moved[name]) for name, value in fitted.state_dict().items())


def test_another_prior_or_beta_in_the_same_directory_is_refused(prior, tmp_path):
    settings = PosteriorSettings(SHORT, diagnostic_rows=4)
    fit_posterior(tmp_path, one_step_data(), prior, Quadratic(), settings)
    other = PosteriorSettings(FinetuneSettings(updates=12, beta=2.0), diagnostic_rows=4)
    with pytest.raises(InputError, match="another configuration.*posterior.finetune.beta was"):
        fit_posterior(tmp_path, one_step_data(), prior, Quadratic(), other)
    with pytest.raises(InputError, match="data_sha256 was"):
        fit_posterior(tmp_path, one_step_data(seed=1), prior, Quadratic(), settings)


def test_a_wrong_critic_is_refused_before_anything_is_written(prior, tmp_path):
    class Wrong:
        def q(self, observation, action):
            return action

    with pytest.raises(InputError, match="shape"):
        fit_posterior(tmp_path / "new", one_step_data(), prior, Wrong())
    assert not (tmp_path / "new").exists()


def test_best_of_n_takes_the_critic_s_choice_and_maps_to_the_box(prior):
    low, high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])
    box = dict(action_low=low, action_high=high)
    observations = torch.linspace(-1, 1, 7)[:, None]
    policy = DiffusionPolicy(prior.sampler, candidates=8, critic=Quadratic(), **box)
    chosen = policy.act(observations, generator=torch.Generator().manual_seed(5))
    draws = prior.sampler.sample(observations, 8, generator=torch.Generator().manual_seed(5))
    draws = draws.clamp(-1, 1)
    best = (draws - 0.5).square().sum(2).argmin(1)
    expected = draws[torch.arange(7), best]
    assert torch.allclose(chosen, low + (expected + 1) / 2 * (high - low))
    with pytest.raises(InputError, match="needs a critic"):
        DiffusionPolicy(prior.sampler, candidates=2, **box)
