"""One posterior for many strengths, against the Gaussian that each of them asks for."""

import json

import numpy as np
import pytest
import torch

from rtb_rl.core import Sampler
from rtb_rl.errors import InputError
from rtb_rl.rl import (
    ActionNetwork,
    AmortisedSettings,
    DiffusionPolicy,
    fit_amortised,
    fit_prior,
    load_dataset,
)
from rtb_rl.rl.posteriors.acting_strength import fit_acting_strength
from rtb_rl.rl.posteriors.amortised import AmortisedPolicy, amortised_model, with_strength
from rtb_rl.training import FinetuneSettings, Mix, PretrainSettings

SMALL = ActionNetwork(levels=8, width=48, blocks=1)
SPREAD = 0.25


class Slope:
    """Q = 2 a: tilts N(0, s^2) to N(2 beta s^2, s^2)."""

    def q(self, observation, action):
        return 2 * action[:, 0]


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    s = random.uniform(-1, 1, (4000, 1)).astype(np.float32)
    a = np.clip(SPREAD * random.standard_normal((4000, 1)), -1, 1).astype(np.float32)
    ends = np.ones(4000, dtype=bool)
    arrays = dict(observations=s, actions=a, rewards=a[:, 0])
    return load_dataset(dict(**arrays, terminals=ends, timeouts=~ends))


@pytest.fixture(scope="module")
def prior(data, tmp_path_factory):
    settings = PretrainSettings(steps=1500, batch=256)
    return fit_prior(tmp_path_factory.mktemp("prior"), data, settings, SMALL)


def settings(updates, **changes):
    finetune = FinetuneSettings(
        updates=updates,
        beta_warmup=1,
        conditions=32,
        mix=Mix(on_policy=8, data=0),
        levels_per_path=None,
        learning_rate=2e-3,
        average_decay=0.98,
    )
    return AmortisedSettings(finetune, low=0.5, high=4.0, network=SMALL, **changes)


@pytest.fixture(scope="module")
def model(data, prior, tmp_path_factory):
    directory = tmp_path_factory.mktemp("amortised")
    return fit_amortised(directory, data, prior, Slope(), settings(500, diagnostic_rows=8))


def test_each_strength_moves_the_mean_as_far_as_the_closed_form(prior, model):
    """One network; the mean at beta is that of the prior + 2 beta s^2, s the prior's own spread."""
    observations = torch.zeros(1, 1)
    generator = torch.Generator().manual_seed(0)
    draws = prior.sampler.sample(observations, 20_000, generator=generator)[0, :, 0]
    for beta in (0.7, 2.0, 3.5):
        condition = with_strength(observations, beta)
        sampler = Sampler(prior.diffusion, model)
        mean = sampler.sample(condition, 20_000, generator=generator).mean()
        weight = (beta * 2 * draws.clamp(-1, 1)).softmax(0)
        assert mean == pytest.approx(float((weight * draws).sum()), abs=0.035), beta


def test_the_strength_of_a_divergence_is_that_of_the_closed_form(data, prior, model, tmp_path):
    """KL(N(2 beta s^2, s^2) from N(0, s^2)) = 2 beta^2 s^2, s the prior's own spread."""
    chosen = settings(500, diagnostic_rows=8)
    generator = torch.Generator().manual_seed(0)
    spread = prior.sampler.sample(torch.zeros(1, 1), 20_000, generator=generator).std()
    given = tmp_path / "acting", data, prior, model, Slope(), chosen
    beta = fit_acting_strength(*given, 0.5)
    assert beta == pytest.approx(float((0.5 / 2) ** 0.5 / spread), rel=0.1)
    told = json.loads((tmp_path / "acting" / "results.json").read_text())
    rising = list(told["divergence"].values())
    assert rising == sorted(rising) and rising[0] < 0.5 < rising[-1]
    assert told["diagnostics"]["kl"] == pytest.approx(0.5, abs=0.1)
    assert fit_acting_strength(*given, 0.5) == beta
    with pytest.raises(InputError, match="kl was 0.5 and is now 0.1"):
        fit_acting_strength(*given, 0.1)


def test_it_starts_exactly_at_the_prior(prior):
    model = amortised_model(prior, 1, SMALL, seed=0)
    x, level = torch.randn(6, 1), torch.tensor([1, 2, 3, 4, 8, 8])
    observations = torch.randn(6, 1)
    found = model(x, level, with_strength(observations, 3.0))
    expected = prior.denoiser(x, level, observations)
    assert torch.equal(found.x0, expected) and not found.log_scale.any()


def test_a_policy_acts_at_the_strength_that_it_is_given(prior):
    seen = []

    class Recorded:
        def __call__(self, x, level, condition):
            seen.append(condition)
            return torch.zeros_like(x)

    one = torch.ones(1)
    policy = DiffusionPolicy(Sampler(prior.diffusion, Recorded()), action_low=-one, action_high=one)
    AmortisedPolicy(policy, 2.5).act(torch.zeros(3, 1), generator=torch.Generator().manual_seed(0))
    assert all(torch.allclose(c[:, 1].exp(), torch.full((3,), 2.5)) for c in seen)


def test_strengths_that_it_is_not_trained_for_are_refused(data, prior, tmp_path):
    with pytest.raises(InputError, match="beta 5 is outside the strengths 0.5 to 4"):
        fit_amortised(tmp_path / "x", data, prior, Slope(), settings(1), acting_beta=5.0)
    with pytest.raises(InputError, match="from 2 to 1 are no range"):
        AmortisedSettings(low=2.0, high=1.0)
    with pytest.raises(InputError, match="leave it at 1"):
        AmortisedSettings(FinetuneSettings(beta=2.0))
