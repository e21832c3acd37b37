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
    PosteriorSettings,
    fit_critic,
    fit_posterior,
    fit_prior,
    load_dataset,
    offline_rl_task,
)
from rtb_rl.rl.critics.training import new_critic, new_iql
from rtb_rl.rl.posteriors.posterior import new_log_z, objective_of, posterior_model
from rtb_rl.rl.posteriors.prior import ActionDiffusion, draw_actions
from rtb_rl.rl.seeds import fit_critics, fit_posteriors, fit_priors
from rtb_rl.rl.seeds import runs as seed_runs
from rtb_rl.rl.seeds.finetuning import SeedFinetuner, clip_each
from rtb_rl.rl.seeds.runs import Generators, of_seed, stacked_state
from rtb_rl.rl.seeds.task import seed_task
from rtb_rl.rl.seeds.training import SeedIQL, SeedPretrainer
from rtb_rl.training import (
    Finetuner,
    FinetuneSettings,
    Mix,
    Pretrainer,
    PretrainSettings,
    generator_for,
    loop,
)
from rtb_rl.training.run import Run

SEEDS = (0, 3, 4)
SMALL = ActionNetwork(levels=6, width=32, blocks=2)
PRIOR = PretrainSettings(steps=120, batch=32)
CRITIC = CriticSettings(steps=100, batch=16, members=3, layer_norm=True)

FINETUNE = FinetuneSettings(
    updates=22, beta_warmup=5, beta=2.0, conditions=6, levels_per_path=3, gradient_clip=0.5
)
POSTERIORS = [
    PosteriorSettings(FINETUNE, grouped_log_z=True, diagnostic_rows=4),
    PosteriorSettings(
        replace(
            FINETUNE,
            levels_per_path=None,
            last_learning_rate=0.1,
            mix=Mix(on_policy=3, prior=2, data=1, widened=2),
        ),
        huber_threshold=1.0,
        langevin=True,
        diagnostic_rows=4,
    ),
]


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
    for step in range(22):
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
    for step in range(22):
        metrics = together.update(step)
        for n, (iql, generator) in enumerate(zip(alone, streams)):
            expected = iql.update(dataset.sample(settings.batch, generator=generator))
            assert metrics.keys() == expected.keys()
            assert_same(of_seed(metrics, n), expected, rtol=1e-9, atol=1e-9)
    state = together.inner.state_dict()
    for n, iql in enumerate(alone):
        for part in ("critic", "target"):
            assert_same(of_seed(state, n)[part], iql.state_dict()[part], rtol=1e-7, atol=1e-7)


def double_policies(settings):
    """Priors with the weights of nothing learned, critics, and posteriors as they start."""
    priors, critics, posteriors = [], [], []
    for seed in SEEDS:
        generator = generator_for(seed, "model")
        prior = ActionDiffusion(3, 2, SMALL, generator=generator).double()
        for parameter in prior.denoiser.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        spread = prior.diffusion.std[1:] * (1 + torch.rand(6, 2, generator=generator))
        prior.diffusion = prior.diffusion.with_spread(spread)
        prior.diffusion.dtype = torch.float64
        priors.append(prior.requires_grad_(False))
        critic = new_critic(3, 2, replace(CRITIC, layer_norm=False), seed=seed)
        critics.append(critic.double().requires_grad_(False))
        posteriors.append(posterior_model(prior, critics[-1], langevin=settings.langevin).double())
    return priors, critics, posteriors


@pytest.mark.parametrize("settings", POSTERIORS, ids=["grouped", "network"])
def test_posteriors_have_the_losses_and_weights_of_separate_training(settings):
    dataset = in_double(data())
    priors, critics, posteriors = double_policies(settings)
    log_zs = [new_log_z(dataset, settings, seed).double() for seed in SEEDS]
    together = SeedFinetuner(
        seed_task(dataset, priors, posteriors, critics),
        log_zs,
        settings.finetune,
        objective_of(settings),
        generators=generators("posterior"),
    )
    alone = [
        Finetuner(
            offline_rl_task(dataset, prior.diffusion, prior.denoiser, posterior.denoiser, critic),
            log_z,
            settings.finetune,
            generator=generator_for(seed, "posterior"),
            objective=objective_of(settings),
        )
        for seed, prior, posterior, critic, log_z in zip(SEEDS, priors, posteriors, critics, log_zs)
    ]
    clipped = []
    for step in range(settings.finetune.updates):
        metrics = together.update(step)
        clipped.append(metrics["rtb/gradient_norm"] > settings.finetune.gradient_clip)
        for n, finetuner in enumerate(alone):
            expected = {k: torch.as_tensor(v) for k, v in finetuner.update(step).items()}
            assert metrics.keys() == expected.keys()
            assert_same(of_seed(metrics, n), expected, rtol=1e-6, atol=1e-6, check_dtype=False)
    share = torch.stack(clipped).double().mean()
    assert 0.1 < share < 1  # of the gradients, so that clipping counts and differs
    for part in ("posterior", "average", "log_z"):
        state = together.parts[part].state_dict()
        for n, finetuner in enumerate(alone):
            own = finetuner.parts[part].state_dict()
            own.pop("updates", None)
            assert_same(of_seed(state, n), own, rtol=1e-6, atol=1e-6)


def test_gradients_are_clipped_seed_by_seed():
    """One seed with a large gradient must not shrink those of the others."""
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(2, 1))]
    parameters[0].grad = torch.tensor([[30.0, 0.0, 0.0], [0.3, 0.0, 0.0]])
    parameters[1].grad = torch.tensor([[40.0], [0.4]])
    norm = clip_each(parameters, 1.0)
    torch.testing.assert_close(norm, torch.tensor([50.0, 0.5]))
    expected = torch.tensor([[0.6, 0.0, 0.0], [0.3, 0.0, 0.0]])
    torch.testing.assert_close(parameters[0].grad, expected)
    torch.testing.assert_close(parameters[1].grad, torch.tensor([[0.8], [0.4]]))
    separate = torch.nn.Parameter(torch.zeros(4))
    separate.grad = torch.tensor([30.0, 0.0, 0.0, 40.0])
    torch.nn.utils.clip_grad_norm_([separate], 1.0)
    ours = torch.cat([parameter.grad[0] for parameter in parameters])
    torch.testing.assert_close(ours, separate.grad, rtol=0, atol=0)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """For each kind of stage: its trainer, and fits of all seeds at once and of one seed."""
    root = tmp_path_factory.mktemp("fitted")
    short = replace(PRIOR, steps=40), replace(CRITIC, steps=40)
    priors = fit_priors([root / f"p{s}" for s in SEEDS], data(), short[0], SMALL, seeds=SEEDS)
    critics = fit_critics([root / f"c{s}" for s in SEEDS], data(), short[1], seeds=SEEDS)
    settings = replace(POSTERIORS[0], finetune=replace(FINETUNE, updates=70))

    def one_posterior(directory, *, seed):
        made_of = priors[SEEDS.index(seed)], critics[SEEDS.index(seed)]
        return fit_posterior(directory, data(), *made_of, settings, seed=seed)

    return {
        "prior": (
            SeedPretrainer,
            partial(fit_priors, dataset=data(), settings=PRIOR, network=SMALL),
            partial(fit_prior, dataset=data(), settings=PRIOR, network=SMALL),
        ),
        "critic": (
            SeedIQL,
            partial(fit_critics, dataset=data(), settings=CRITIC),
            partial(fit_critic, dataset=data(), settings=CRITIC),
        ),
        "posterior": (
            SeedFinetuner,
            partial(
                fit_posteriors, dataset=data(), priors=priors, critics=critics, settings=settings
            ),
            one_posterior,
        ),
    }


KINDS = pytest.mark.parametrize("kind", ["prior", "critic", "posterior"])


@KINDS
def test_stages_are_those_of_separate_runs(kind, kinds, tmp_path):
    _, fit_all, fit_one = kinds[kind]
    together = [tmp_path / f"together{seed}" for seed in SEEDS]
    modules = fit_all(together, seeds=SEEDS)
    for seed, directory, module in zip(SEEDS, together, modules):
        alone = tmp_path / f"alone{seed}"
        expected = fit_one(alone, seed=seed)
        assert_same(module.state_dict(), expected.state_dict(), rtol=2e-3, atol=2e-3)
        assert (directory / "config.json").read_bytes() == (alone / "config.json").read_bytes()
        ours, theirs = (json.loads((d / "results.json").read_text()) for d in (directory, alone))
        assert ours.keys() == theirs.keys()
        ours, theirs = (found.get("diagnostics", {}) for found in (ours, theirs))
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-2)
        files = [sorted(p.relative_to(d) for p in d.rglob("*.json")) for d in (directory, alone)]
        assert files[0] == files[1]
        for ours, theirs in zip(metrics_of(directory), metrics_of(alone), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-2, abs=2e-3)
        reloaded = fit_one(directory, seed=seed)
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

    def train(*arguments, **given):
        return loop.train(*arguments, **{**given, "checkpoint_every": 20, "log_every": 20})

    monkeypatch.setattr(seed_runs, "train", train)


@KINDS
def test_killed_seeds_resume_to_the_same_weights(kind, kinds, often, tmp_path, monkeypatch):
    trainer, fit, _ = kinds[kind]
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
    priors = fit_priors(directories, data(), replace(PRIOR, steps=2), SMALL, seeds=SEEDS)
    with pytest.raises(InputError, match="another configuration"):
        fit_priors(directories, data(rows=300), replace(PRIOR, steps=2), SMALL, seeds=SEEDS)
    critics = [new_critic(3, 2, CRITIC) for _ in SEEDS]
    new = [tmp_path / f"posterior{seed}" for seed in SEEDS]
    with pytest.raises(InputError, match="2 critics for 3 seeds"):
        fit_posteriors(new, data(), priors, critics[:2], seeds=SEEDS)
    wide = ActionDiffusion(3, 2, replace(SMALL, width=16), generator=generator_for(0, "wide"))
    with pytest.raises(InputError, match=r"networks 0 and 2 can't be stacked.*one kind and size"):
        fit_posteriors(new, data(), [*priors[:2], wide], critics, seeds=SEEDS)
    replayed = PosteriorSettings(replace(FINETUNE, mix=Mix(replay=1)))
    with pytest.raises(InputError, match="fit the seeds one by one"):
        fit_posteriors(new, data(), priors, critics, replayed, seeds=SEEDS)
    assert not any(directory.exists() for directory in new)


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
