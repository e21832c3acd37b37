"""DDPP-LB where it is exact, one masked token; and that nothing is lost by an interruption."""

import dataclasses

import pytest
import torch
from affine_chain import LINEAR, make_task
from torch import Generator, Tensor, nn

from rtb_rl.baselines.denoising import DenoisingPosterior, DenoisingSettings
from rtb_rl.core import IndependentReveals, MaskedDiffusion, linear_masking
from rtb_rl.errors import InputError, NonFiniteError
from rtb_rl.tasks.toy import TokenSpace, terminal_law, token_task, total_variation
from rtb_rl.tasks.toy.enumeration import tilted
from rtb_rl.training import Run, Task, train

EXACT = {"learning_rate": 0.1, "log_z_learning_rate": 0.1, "last_learning_rate": 0.01}


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


class LogZTable(nn.Module):
    """log Z of every sequence of tokens and masks."""

    def __init__(self, space: TokenSpace):
        super().__init__()
        self.space = space
        self.table = nn.Parameter(torch.zeros(len(space.sequences), dtype=torch.float64))

    def forward(self, x, level, condition):
        return self.table[self.space.index(x)]


def one_token(vocabulary: int, levels: int = 3, length: int = 1) -> Task:
    reveals = IndependentReveals(linear_masking(levels), length)
    return token_task(vocabulary, length, reveals, generator=seeded()).task


def make_trainer(task: Task, seed: int = 0, **settings) -> DenoisingPosterior:
    log_z = LogZTable(TokenSpace(task.diffusion.mask, task.diffusion.length))
    return DenoisingPosterior(task, log_z, DenoisingSettings(**settings), generator=seeded(seed))


def laws(task: Task, posterior: nn.Module, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of the prior, of its tilt by r^beta and of a posterior, by enumeration."""
    prior = terminal_law(task.diffusion, task.prior)
    clean = TokenSpace(task.diffusion.mask, task.diffusion.length).clean
    target = tilted(prior, beta * task.log_reward(clean, None))
    return prior, target, terminal_law(task.diffusion, posterior)


@pytest.mark.parametrize(
    ("vocabulary", "beta", "settings"),
    [
        (2, 1.0, {}),
        (8, 1.0, {"data": 0, "refresh": 1, "replay_capacity": 256}),
        (8, 0.4, {}),
        (8, 1.0, {"refresh": 10_000, "paths": 64, "conditions": 16}),  # the prior's draws alone
    ],
)
def test_one_token_is_learned_exactly_wherever_the_points_come_from(vocabulary, beta, settings):
    task = one_token(vocabulary)
    trainer = make_trainer(task, updates=400, beta=beta, **EXACT | settings)
    for step in range(400):
        metrics = trainer.update(step)
    prior, target, found = laws(task, trainer.average.module, beta)
    assert total_variation(prior, target) > 0.05
    assert total_variation(found, target) < 0.01
    assert float(metrics["ddpp/loss"]) < 0.01
    start = torch.full((1, 1), vocabulary)
    clean = torch.arange(vocabulary)[:, None]
    exact = (prior.log() + beta * task.log_reward(clean, None)).logsumexp(0)
    log_z = trainer.log_z(start, torch.tensor([3]), None)
    assert float(log_z.detach()) == pytest.approx(float(exact), abs=0.05)


def test_the_exact_posterior_has_loss_zero_and_stays():
    """Masked and clean tokens; the table of log Z knows both."""
    task = one_token(5)
    trainer = make_trainer(task, refresh=1)
    space, log_reward = TokenSpace(5, 1), task.log_reward(torch.arange(5)[:, None], None)
    prior = terminal_law(task.diffusion, task.prior)
    table = trainer.log_z.network.table
    with torch.no_grad():
        task.posterior.correction[-1, 0] = log_reward
        table[space.clean_index] = log_reward
        table[-1] = (prior.log() + log_reward).logsumexp(0)
    metrics = trainer.update(1)
    assert float(metrics["ddpp/loss"]) < 1e-20
    assert float(metrics["ddpp/gradient_norm"]) < 1e-9
    with torch.no_grad():
        table[-1] += 0.1
    assert float(trainer.update(1)["ddpp/loss"]) > 1e-3


def test_log_z_starts_at_the_mean_reward():
    """Far from zero; a step of the posterior is then as it would be without the distance."""
    moved = []
    for distance in (0.0, -300.0):
        task = one_token(4)
        plain = task.log_reward
        task = dataclasses.replace(
            task, log_reward=lambda x0, c, plain=plain, d=distance: plain(x0, c) + d
        )
        trainer = make_trainer(task, learning_rate=1e-2, data=0, beta=2.0)
        metrics = trainer.update(0)
        assert float(metrics["ddpp/log_z_offset"]) != 0
        moved.append(
            (task.posterior.correction.detach().clone(), float(trainer.log_z.offset.detach()))
        )
    torch.testing.assert_close(moved[0][0], moved[1][0], rtol=1e-3, atol=1e-6)
    assert moved[0][1] - moved[1][1] == pytest.approx(600, abs=1e-2)


class OfCondition(nn.Module):
    """A learned law of one token for each of two conditions."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2, vocabulary, dtype=torch.float64))

    def forward(self, x, level, condition):
        return self.logits[condition].log_softmax(-1)[:, None]


class LogZOfCondition(nn.Module):
    """log Z of one token, masked or not, for each of two conditions."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2, vocabulary + 1, dtype=torch.float64))

    def forward(self, x, level, condition):
        return self.table[condition, x[:, 0]]


REWARDS = torch.tensor([[0.0, 1.0, 2.0], [1.5, 0.0, -1.0]]).double()


def conditional(scored: list, **changes) -> Task:
    """A uniform prior; the data point of condition c is c. Scored points are written down."""

    def draw(n, *, generator):
        condition = torch.randint(2, (n,), generator=generator)
        return condition, condition[:, None].clone()

    def log_reward(x0, condition):
        scored.append((x0, condition))
        return REWARDS[condition, x0[:, 0]]

    diffusion = MaskedDiffusion(1, 3, IndependentReveals(linear_masking(2), 1))
    task = Task("conditional", diffusion, OfCondition(3), OfCondition(3), log_reward, draw)
    return dataclasses.replace(task, **changes)


def conditional_trainer(task: Task, **settings) -> DenoisingPosterior:
    settings = {"updates": 300} | EXACT | settings
    return DenoisingPosterior(
        task, LogZOfCondition(3), DenoisingSettings(**settings), generator=seeded()
    )


def test_every_condition_gets_its_own_posterior():
    trainer = conditional_trainer(conditional([]), conditions=16, paths=4)
    for step in range(300):
        trainer.update(step)
    found = trainer.average.module.logits.softmax(-1)
    torch.testing.assert_close(found, REWARDS.softmax(-1), rtol=0, atol=0.01)


def test_points_are_remembered_ones_and_data_each_with_its_condition():
    scored = []
    trainer = conditional_trainer(conditional(scored), conditions=16, paths=4, refresh=2)
    trainer.update(0)
    assert [len(x0) for x0, _ in scored] == [64, 16]  # drawn, then data
    x0, condition = scored[1]
    assert torch.equal(x0[:, 0], condition)
    trainer.update(1)
    assert [len(x0) for x0, _ in scored[2:]] == [16]
    assert len(trainer.replay) == 64
    trainer.update(2)
    assert len(trainer.replay) == 128
    x0, condition, log_reward = trainer._points()
    assert len(x0) == 80
    torch.testing.assert_close(log_reward, REWARDS[condition, x0[:, 0]])
    assert torch.equal(x0[64:, 0], condition[64:])
    own = conditional_trainer(conditional(scored), conditions=16, paths=4, data=0)
    own._remember()
    assert len(own._points()[0]) == 64


def test_calls_are_those_of_fresh_points_and_of_one_evaluation_for_each_point():
    trainer = make_trainer(one_token(3, levels=5), conditions=4, paths=2, refresh=2, data=0)
    fresh, learned = 8 * 5, 8 * (1 + 3)
    for step, expected in enumerate([fresh + learned, learned, fresh + learned]):
        before = trainer.calls
        assert trainer.update(step)["ddpp/calls"] - before == expected


def test_impossible_points_get_the_floor():
    task = one_token(3)
    plain = task.log_reward
    task = dataclasses.replace(
        task, log_reward=lambda x0, c: plain(x0, c).masked_fill(x0[:, 0] == 1, -torch.inf)
    )
    trainer = make_trainer(task, updates=200, log_reward_floor=-8.0, **EXACT)
    floored = float(trainer.update(0)["ddpp/floored"])
    assert floored > 0
    for step in range(1, 200):
        trainer.update(step)
    assert float(terminal_law(task.diffusion, trainer.average.module)[1]) < 0.01


def test_resumed_training_is_bit_equal(tmp_path):
    def fit(directory, stop_at=None):
        task = one_token(3, length=2)
        trainer = make_trainer(
            task, updates=12, refresh=5, replay_capacity=300, last_learning_rate=0.1
        )

        def update(step):
            if step == stop_at:
                raise KeyboardInterrupt
            return trainer.update(step)

        run, every = Run(directory, {}), {"log_every": 2, "checkpoint_every": 4}
        train(run, update, trainer.parts, steps=12, description="toy", **every)
        return {**trainer.average.module.state_dict(), **trainer.log_z.state_dict()}

    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", stop_at=7)
    resumed = fit(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]


def test_every_setting_reaches_the_learner():
    given = {
        field.name: field.default + 1
        for field in dataclasses.fields(DenoisingSettings)
        if field.name not in {"data", "refresh", "replay_capacity", "log_z_learning_rate"}
    }
    shared = dataclasses.asdict(DenoisingSettings(**given).shared)
    assert len(given) == 9 and {name: shared[name] for name in given} == given


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"refresh": 0}, "refresh is 0; give 1 or more updates"),
        ({"data": 2}, "data is 2: a condition has one data point"),
        ({"replay_capacity": 255}, r"is 255, but conditions \* paths = 256 points"),
        ({"paths": 0}, "paths is 0; give 1 or more"),
        ({"updates": 0}, "updates is 0; give 1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        make_trainer(one_token(3), **settings)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="needs a MaskedDiffusion, not GaussianDiffusion"):
        DenoisingPosterior(
            make_task(LINEAR, scaled=False), nn.Identity(), DenoisingSettings(), generator=seeded()
        )
    wide = DenoisingPosterior(
        one_token(3), LogZOfCondition(3), DenoisingSettings(), generator=seeded()
    )
    wide.log_z.network.forward = lambda x, level, condition: torch.zeros(len(x), 1)
    with pytest.raises(InputError, match=r"log Z network returned \(288, 1\) for 288 points"):
        wide.update(0)  # 256 remembered points and 32 of data
    few = conditional(
        [],
        draw_conditions=lambda n, *, generator: (torch.zeros(n).long(), torch.zeros(3, 1).long()),
    )
    with pytest.raises(InputError, match="returned 3 data points for 32 conditions"):
        trainer = conditional_trainer(few)
        trainer.update(0)


def test_nan_stops_before_the_parameters_move():
    task = one_token(3)
    trainer = make_trainer(task)
    trainer.update(0)
    before = task.posterior.correction.detach().clone()
    with torch.no_grad():
        trainer.log_z.offset.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="loss is nan at step 1"):
        trainer.update(1)
    assert torch.equal(task.posterior.correction, before)
