"""Seeds trained at once against the same seeds trained one by one."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from rtb_rl.errors import InputError
from rtb_rl.rl import (
    ActionNetwork,
    CriticSettings,
    fit_critic,
    fit_prior,
    load_dataset,
    seed_runs,
)
from rtb_rl.rl.critic_training import new_critic, new_iql
from rtb_rl.rl.prior import ActionDiffusion, draw_actions
from rtb_rl.rl.seed_runs import Generators, of_seed, stacked_state
from rtb_rl.rl.seed_training import SeedIQL, SeedPretrainer
from rtb_rl.rl.seeds import fit_critics, fit_priors
from rtb_rl.training import Pretrainer, PretrainSettings, generator_for, loop
from rtb_rl.training.run import Run

SEEDS = (0, 3, 4)
SMALL = ActionNetwork(levels=6, width=32, blocks=2)
PRIOR = PretrainSettings(steps=120, batch=32)
CRITIC = CriticSettings(steps=120, batch=32, members=3, layer_norm=True)


def data(rows=400, *, sizes=(3, 2), seed=0):
    """Episodes of ten random steps; the reward is the sum of the action."""
    random = np.random.default_rng(seed)
    observations = random.standard_normal((rows, sizes[0])).astype(np.float32)
    actions = random.uniform(-1, 1, (rows, sizes[1])).astype(np.float32)
    ends = np.arange(rows) % 10 == 9
    arrays = dict(observations=observations, actions=actions, rewards=actions.sum(1))
    return load_dataset({**arrays, "terminals": ends, "timeouts": np.zeros(rows, dtype=bool)})


def in_double(dataset):
    tensors = {
        k: v.double() for k, v in vars(dataset).items() if getattr(v, "is_floating_point", bool)()
    }
    return replace(dataset, **tensors)


def assert_same(states, expected, **tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(states[name], value, **tolerance, msg=lambda m, n=name: n + m)


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def generators(name):
    return Generators([generator_for(seed, name) for seed in SEEDS])


def test_priors_have_the_losses_and_weights_of_separate_training():
    dataset = in_double(data())
    models = [
        ActionDiffusion(3, 2, SMALL, generator=generator_for(seed, "model")).double()
        for seed in SEEDS
    ]
    together = SeedPretrainer(models, draw_actions(dataset), PRIOR, generators=generators("prior"))
    alone = [
        Pretrainer(
            model.diffusion,
            model.denoiser,
            draw_actions(dataset),
            PRIOR,
            generator=generator_for(seed, "prior"),
        )
        for model, seed in zip(models, SEEDS)
    ]
    for step in range(25):
        losses = together.update(step)["prior/loss"]
        expected = torch.stack([trainer.update(step)["prior/loss"] for trainer in alone])
        assert losses.dtype == torch.float64 and len(losses.unique()) == len(SEEDS)
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
    for part in ("denoiser", "average"):
        state = together.parts[part].state_dict()
        for n, trainer in enumerate(alone):
            own = trainer.parts[part].state_dict()
            own.pop("updates", None)
            assert_same(of_seed(state, n), own, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_critics_have_the_losses_and_weights_of_separate_training(layer_norm):
    dataset, settings = in_double(data()), replace(CRITIC, layer_norm=layer_norm)
    critics = [new_critic(3, 2, settings, seed=seed).double() for seed in SEEDS]
    for critic in critics:
        critic.standardise(dataset.observations)
    together = SeedIQL(critics, dataset, settings, generators=generators("critic"))
    alone = [new_iql(critic, settings) for critic in critics]
    streams = [generator_for(seed, "critic") for seed in SEEDS]
    for step in range(25):
        metrics = together.update(step)
        for n, (iql, generator) in enumerate(zip(alone, streams)):
            expected = iql.update(dataset.sample(settings.batch, generator=generator))
            assert metrics.keys() == expected.keys()
            assert_same(of_seed(metrics, n), expected, rtol=1e-9, atol=1e-9)
    state = together.inner.state_dict()
    for n, iql in enumerate(alone):
        for part in ("critic", "target"):
            assert_same(of_seed(state, n)[part], iql.state_dict()[part], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "fit_all, fit_one, settings",
    [
        (
            lambda *a, **k: fit_priors(*a, SMALL, **k),
            lambda *a, **k: fit_prior(*a, SMALL, **k),
            PRIOR,
        ),
        (fit_critics, fit_critic, CRITIC),
    ],
)
def test_stages_are_those_of_separate_runs(fit_all, fit_one, settings, tmp_path):
    together = [tmp_path / f"together{seed}" for seed in SEEDS]
    modules = fit_all(together, data(), settings, seeds=SEEDS)
    for seed, directory, module in zip(SEEDS, together, modules):
        alone = tmp_path / f"alone{seed}"
        expected = fit_one(alone, data(), settings, seed=seed)
        assert_same(module.state_dict(), expected.state_dict(), rtol=2e-3, atol=2e-3)
        for name in ("config.json", "manifest.json"):
            ours, theirs = (json.loads((d / name).read_text()) for d in (directory, alone))
            assert {**ours, "created": 0} == {**theirs, "created": 0}
        files = [sorted(p.relative_to(d) for p in d.rglob("*.json")) for d in (directory, alone)]
        assert files[0] == files[1]
        for ours, theirs in zip(metrics_of(directory), metrics_of(alone), strict=True):
            assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-3)
        reloaded = fit_one(directory, data(), settings, seed=seed)
        assert_same(reloaded.state_dict(), module.state_dict(), rtol=0, atol=0)
        assert not any(p.requires_grad for p in module.parameters())


class Killed(Exception):
    pass


def killing(function, at):
    """`function` that raises at call number `at`."""
    calls = iter(range(1, 10**6))

    def wrapped(*arguments, **named):
        if next(calls) == at:
            raise Killed
        return function(*arguments, **named)

    return wrapped


@pytest.fixture
def often(monkeypatch):
    """Checkpoints after every 20 steps."""
    monkeypatch.setattr(seed_runs, "train", partial(loop.train, checkpoint_every=20, log_every=20))


JOINT = {
    "prior": (SeedPretrainer, partial(fit_priors, dataset=data(), settings=PRIOR, network=SMALL)),
    "critic": (SeedIQL, partial(fit_critics, dataset=data(), settings=CRITIC)),
}


@pytest.mark.parametrize("kind", JOINT)
def test_killed_seeds_resume_to_the_same_weights(kind, often, tmp_path, monkeypatch):
    trainer, fit = JOINT[kind]
    expected = fit([tmp_path / f"whole{seed}" for seed in SEEDS], seeds=SEEDS)
    directories = [tmp_path / str(seed) for seed in SEEDS]
    for owner, method, call in (
        (trainer, "update", 51),  # after the checkpoint of step 40
        (Run, "save", 2),  # the first of three seeds has the checkpoint of step 60
        (Run, "finish", 2),  # the first of three seeds is complete
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, method, killing(getattr(owner, method), call))
            with pytest.raises(Killed):
                fit(directories, seeds=SEEDS)
    resumed = fit(directories, seeds=SEEDS)
    for seed, directory, ours, theirs in zip(SEEDS, directories, resumed, expected):
        assert_same(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
        assert metrics_of(directory) == metrics_of(tmp_path / f"whole{seed}")


def test_a_seed_interrupted_among_others_goes_on_alone(often, tmp_path, monkeypatch):
    expected = fit_prior(tmp_path / "whole", data(), PRIOR, SMALL, seed=3)
    directories = [tmp_path / str(seed) for seed in SEEDS]
    with monkeypatch.context() as patched:
        patched.setattr(SeedPretrainer, "update", killing(SeedPretrainer.update, 51))
        with pytest.raises(Killed):
            fit_priors(directories, data(), PRIOR, SMALL, seeds=SEEDS)
    alone = fit_prior(directories[1], data(), PRIOR, SMALL, seed=3)
    assert_same(alone.state_dict(), expected.state_dict(), rtol=2e-3, atol=2e-3)
    assert [line["step"] for line in metrics_of(directories[1])] == [20, 40, 100]


def test_what_does_not_fit_together_is_refused(tmp_path):
    directories = [tmp_path / str(seed) for seed in SEEDS]
    with pytest.raises(InputError, match="2 directories for 3 seeds"):
        fit_priors(directories[:2], data(), PRIOR, SMALL, seeds=SEEDS)
    with pytest.raises(InputError, match="no seed"):
        fit_critics([], data(), CRITIC, seeds=())
    with pytest.raises(InputError, match="one directory"):
        fit_critics([directories[0]] * 3, data(), CRITIC, seeds=SEEDS)
    assert not list(tmp_path.iterdir())
    fit_priors(directories, data(), replace(PRIOR, steps=2), SMALL, seeds=SEEDS)
    with pytest.raises(InputError, match="another configuration"):
        fit_priors(directories, data(rows=300), replace(PRIOR, steps=2), SMALL, seeds=SEEDS)


def test_states_are_cut_and_put_together():
    state = {
        "weights": torch.arange(6.0).reshape(2, 3),
        "offset": torch.tensor([7.0, 8.0]),
        "optimiser": {0: {"step": torch.tensor(5.0), "exp_avg": torch.ones(2, 4)}},
        "groups": [{"lr": 0.1, "params": [0, 1], "betas": (0.9, 0.99)}],
        "nothing": None,
    }
    each = [of_seed(state, n) for n in range(2)]
    assert each[1]["offset"].shape == () and float(each[1]["offset"]) == 8
    assert float(each[0]["optimiser"][0]["step"]) == 5
    again = stacked_state(each)
    assert torch.equal(again["weights"], state["weights"])
    assert torch.equal(again["offset"], state["offset"])
    assert again["optimiser"][0]["step"].shape == ()
    assert again["optimiser"][0]["exp_avg"].shape == (2, 4)
    assert again["groups"][0]["params"] == [0, 1] and again["nothing"] is None
