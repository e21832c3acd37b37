"""Energy guidance against a Gaussian prior and a linear log-reward, where all is known exactly.

prior N(m, v), log r = b a: the policy is N(m + b v, v) and f(x) = b E[a | x] + b^2 Var[a | x] / 2.
"""

import math

import numpy as np
import pytest
import torch
from kills import assert_same_stage, checkpoint_often, killed_at
from torch import nn

from rtb_rl.core import GaussianDiffusion, Sampler, log_snr_schedule, zero_terminal_signal
from rtb_rl.core.gaussian import small_spread
from rtb_rl.errors import InputError
from rtb_rl.rl import ActionDiffusion, ActionNetwork, load_dataset
from rtb_rl.rl.peers.contrastive_energy import contrastive_energy_loss
from rtb_rl.rl.peers.energy_guidance import (
    EnergyGuidanceSettings,
    EnergyGuidedDenoiser,
    energy_gradient,
    fit_energy_guidance,
    load_energy_guidance,
)
from rtb_rl.rl.posteriors.prior_actions import own_actions
from rtb_rl.training import generator_for

LEVELS, V, B = 10, 0.04, 5.0
SCHEDULE = zero_terminal_signal(log_snr_schedule(LEVELS))


class ExactDenoiser(nn.Module):
    """E[a | x] for a ~ N(condition, V), one dimension."""

    signal: torch.Tensor

    def __init__(self, shift: float = 0.0):
        super().__init__()
        self.shift = shift
        self.register_buffer("signal", SCHEDULE.signal)

    def tables(self, level, dtype=torch.float64):
        signal = self.signal[level][:, None].to(dtype)
        return signal, signal.square() * V + 1 - signal.square()

    def forward(self, x, level, condition):
        signal, total = self.tables(level, x.dtype)
        mean = condition + self.shift
        return mean + signal * V * (x - signal * mean) / total

    def variance(self, level):
        """Var[a | x], [batch, 1]."""
        signal, total = self.tables(level)
        return V * (1 - signal.square()) / total


class ExactEnergy(ExactDenoiser):
    def forward(self, x, level, condition):
        spread = self.variance(level).to(x.dtype)
        return B * super().forward(x, level, condition) + B**2 * spread / 2


def exact_diffusion() -> GaussianDiffusion:
    """Steps with the spread that the data has around the exact denoiser."""
    small, narrow = (
        small_spread(SCHEDULE, floor=1e-3),
        GaussianDiffusion(SCHEDULE, (1,), small_spread(SCHEDULE, floor=1e-3)),
    )
    level = torch.arange(1, LEVELS + 1)
    left = narrow.weight_x0[1:].square() * ExactDenoiser().variance(level)
    return GaussianDiffusion(SCHEDULE, (1,), (small.square() + left[:, 0]).sqrt())


def guided(scale: float) -> EnergyGuidedDenoiser:
    return EnergyGuidedDenoiser(exact_diffusion(), ExactDenoiser(), ExactEnergy(), scale=scale)


def test_the_shifted_prediction_is_that_of_the_tilted_prior_at_every_level() -> None:
    """The prediction moves by noise^2 / signal grad f: to E[a | x] under N(m + b V, V)."""
    generator = generator_for(0, "x")
    level = torch.arange(1, LEVELS + 1).repeat(20)
    x = torch.randn(len(level), 1, generator=generator).double()
    m = torch.randn(len(level), 1, generator=generator).double()
    found, exact = guided(1.0)(x, level, m), ExactDenoiser(shift=B * V)(x, level, m)
    sees = level < LEVELS  # at the last no signal is left
    torch.testing.assert_close(found[sees], exact[sees])
    one_below = B * ExactDenoiser().variance(level[~sees] - 1)
    torch.testing.assert_close(found[~sees], m[~sees] + one_below)
    torch.testing.assert_close(found[~sees], exact[~sees], rtol=0, atol=2e-3 * B * V)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_guided_draws_are_those_of_the_tilted_prior(scale) -> None:
    """For a linear log-reward scale * f is the exact energy of the scaled reward."""
    n, m = 40_000, 0.3
    sampler = Sampler(exact_diffusion(), guided(scale))
    draws = sampler.sample(torch.full((1, 1), m), n, generator=generator_for(1, "draws"))
    error = math.sqrt(V / n)
    assert float(draws.mean()) == pytest.approx(m + scale * B * V, abs=4 * error + 1e-3)
    assert float(draws.std()) == pytest.approx(math.sqrt(V), abs=4 * error)


def test_scale_zero_is_the_prior_to_the_bit() -> None:
    diffusion, condition = exact_diffusion(), torch.linspace(-1, 1, 7)[:, None]
    draws = [
        Sampler(diffusion, d).sample(condition, 9, generator=generator_for(2, "draws"))
        for d in (ExactDenoiser(), guided(0.0), guided(1e-3))
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def noised_draws(candidates: int, level: int, strength: float, states: int):
    """log r [states, M] of draws of N(0, 1), and the draws noised to a level."""
    generator, signal = generator_for(3, "noised"), SCHEDULE.signal[level]
    x0, eps = torch.randn(2, states, candidates, generator=generator).double()
    return strength * x0, signal * x0 + (1 - signal.square()).sqrt() * eps


def best_slope(weight, x) -> float:
    """The b that minimises the loss of f = b x, a convex problem, by Newton's method."""
    b = x.new_zeros(())
    for _ in range(40):
        p = (b * x).softmax(1)
        mean = (p * x).sum(1)
        curvature = (p * x.square()).sum(1) - mean.square()
        gradient = (weight * x).sum(1) - weight.sum(1) * mean
        b = b + gradient.mean() / (weight.sum(1) * curvature).mean()
    return float(b)


@pytest.mark.parametrize("candidates", [2, 8])
@pytest.mark.parametrize("level", [1, 4, 7])
def test_the_loss_is_least_at_the_exact_energy(candidates, level) -> None:
    """With weights exp(beta Q); for a prior N(0, 1) and log r = 0.7 a, f = 0.7 signal x."""
    value, x = noised_draws(candidates, level, 0.7, 300_000 // candidates)
    exact, weight = 0.7 * float(SCHEDULE.signal[level]), value.exp()
    assert best_slope(weight, x) == pytest.approx(exact, abs=0.01)

    def loss(energy):
        return float(contrastive_energy_loss(energy, weight))

    least = loss(exact * x)
    constant = torch.randn(len(x), 1, generator=generator_for(4, "constant"))
    assert loss(exact * x + constant) == pytest.approx(least)
    for wrong in (0.8 * exact * x, 1.2 * exact * x, exact * x + 0.1 * x**2, x.sin(), 0 * x):
        assert loss(wrong) > least + 1e-5


@pytest.mark.parametrize(("strength", "flatter"), [(1.0, 0.06), (3.0, 0.41)])
def test_weights_that_sum_to_one_make_the_energy_too_flat(strength, flatter) -> None:
    """What the docstring of the loss says of M = 16 and half the signal."""
    level = int((SCHEDULE.signal - 0.5).abs().argmin())
    value, x = noised_draws(16, level, strength, 60_000)
    signal = float(SCHEDULE.signal[level])
    assert signal == pytest.approx(0.5, abs=0.1)
    slope = best_slope(value.softmax(1), x)
    assert 1 - slope / (strength * signal) == pytest.approx(flatter, abs=0.04)


class Linear:
    """beta Q = b a with beta = 2."""

    def q(self, observation, action):
        return B / 2 * action[:, 0]


def prior() -> ActionDiffusion:
    network, generator = ActionNetwork(levels=LEVELS, width=8, blocks=1), generator_for(0, "prior")
    model = ActionDiffusion(1, 1, network, generator=generator)
    model.diffusion, model.denoiser = exact_diffusion(), ExactDenoiser()
    return model.requires_grad_(False)


def bandit(rows: int = 300):
    """States between -0.1 and 0.1, in the environment's actions [-2, 2]."""
    s = np.random.default_rng(0).uniform(-0.1, 0.1, (rows, 1)).astype(np.float32)
    ends = np.ones(rows, dtype=bool)
    arrays = dict(observations=s, actions=s, rewards=s[:, 0], terminals=ends, timeouts=~ends)
    return load_dataset(arrays, action_box=(-2.0, 2.0))


def test_a_bandit_reaches_the_value_of_its_closed_form(tmp_path) -> None:
    """log r has std 1: with 32 candidates the energy is a few per cent too flat."""
    settings = EnergyGuidanceSettings(
        beta=2, candidates=32, steps=300, batch=16, learning_rate=1e-3
    )
    policy = fit_energy_guidance(tmp_path, bandit(), prior(), Linear(), settings)
    s = torch.linspace(-0.1, 0.1, 4000)[:, None]
    actions = policy.act(s, generator=generator_for(0, "act")) / 2
    q = Linear().q(s, actions).mean()
    assert float(q) == pytest.approx(B / 2 * B * V, rel=0.1)  # 0 before
    assert float((actions - s).std()) == pytest.approx(math.sqrt(V), rel=0.1)
    energy = policy.sampler.denoiser.energy  # type: ignore[attr-defined]
    level = torch.full((4000,), 4)
    slope = energy_gradient(energy, s, level, s)
    exact = energy_gradient(ExactEnergy(), s, level, s)
    assert float(slope.mean()) == pytest.approx(float(exact.mean()), rel=0.15)


def test_a_killed_run_ends_like_one_that_was_not(tmp_path, monkeypatch) -> None:
    checkpoint_often(monkeypatch, log_every=3, checkpoint_every=5)
    data, model, seen = bandit(40), prior(), []
    settings = EnergyGuidanceSettings(steps=23, batch=8, candidates=4, rows=30)

    def fit(name, **given):
        return fit_energy_guidance(
            tmp_path / name, data, model, Linear(), settings, seed=4, **given
        )

    whole = fit("whole", watch=lambda *point: seen.append(point))
    assert [point[:2] for point in seen] == [(done, 23) for done in range(1, 24)]
    assert all(point[2] is whole for point in seen)
    with killed_at(monkeypatch, 15):
        fit("cut")
    fit("cut", scale=3.0)  # the scale is no part of the stage
    assert not own_actions(tmp_path / "cut").exists()
    assert_same_stage(tmp_path / "whole", tmp_path / "cut")
    fit("third", actions=tmp_path / "actions")
    assert (tmp_path / "actions" / "results.json").exists()
    observations, acts = torch.randn(7, 1, generator=generator_for(0, "o")), []
    loaded = [load_energy_guidance(tmp_path / name, model) for name in ("cut", "third")]
    for policy in (whole, *loaded, load_energy_guidance(tmp_path / "cut", model, scale=9)):
        acts.append(policy.act(observations, generator=generator_for(0, "act")))
    assert torch.equal(acts[0], acts[1]) and torch.equal(acts[0], acts[2])
    assert not torch.equal(acts[0], acts[3]) and acts[3].abs().max() <= 2


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    for wrong in ({"beta": -1}, {"candidates": 1}, {"batch": 0}):
        with pytest.raises(InputError, match="energy guidance got"):
            EnergyGuidanceSettings(**wrong)  # type: ignore[arg-type]
    settings = EnergyGuidanceSettings(steps=1, batch=2, candidates=2, rows=3)
    fit_energy_guidance(tmp_path, bandit(10), prior(), Linear(), settings)
    other = ActionDiffusion(1, 1, ActionNetwork(), generator=generator_for(0, "other"))
    with pytest.raises(InputError, match="another prior"):
        load_energy_guidance(tmp_path, other)
    with pytest.raises(InputError, match="returned"):
        fit_energy_guidance(tmp_path, bandit(10), prior(), TwoNumbers(), settings)


class TwoNumbers:
    def q(self, observation, action):
        return torch.zeros(len(action), 2)
