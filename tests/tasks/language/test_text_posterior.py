"""Posteriors of gaps: where they start, what they find where all can be listed, how they resume."""

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hub_models import save_bert
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

from rtb_rl.baselines import ImportanceReference
from rtb_rl.core import OnDemand, elbo, importance_log_z, log_weight, rollout_against
from rtb_rl.errors import InputError
from rtb_rl.nn.transformer import MaskedTransformer
from rtb_rl.tasks.language import posterior as posterior_module
from rtb_rl.tasks.language.codec import train_word_codec
from rtb_rl.tasks.language.denoiser import TextPrior, fading
from rtb_rl.tasks.language.foreign import foreign_prior
from rtb_rl.tasks.language.log_z import ContextValue, network_log_z
from rtb_rl.tasks.language.posterior import fit_text_posterior, text_task
from rtb_rl.tasks.language.prompts import Frame, Gap, Prompts
from rtb_rl.tasks.language.rewards import token_log_reward
from rtb_rl.tasks.language.trainers import (
    MakeTrainer,
    TextPosteriorSettings,
    denoising_posterior,
    relative_trajectory_balance,
    supervised,
)
from rtb_rl.training import Finetuner, FinetuneSettings, Mix, PretrainSettings, loop
from rtb_rl.training.stage import fingerprint

WORDS, LEVELS = "a b c", 4
CODEC = train_word_codec([WORDS], 7)
FRAME = Frame(CODEC, slots=2, window=5)
IDS = [CODEC.encode([word])[0][0] for word in WORDS.split()]
GAPS = [
    Gap(left, right, f"{first} {second}")
    for left, right, first, second in itertools.product("ab", ("c", "b a"), "ac", "bc")
]
ALONE = [Gap("a b", "", "c"), Gap("c", "", "a b")]


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def new_prior(frame: Frame = FRAME, seed: int = 0, scale: float = 2.0) -> TextPrior:
    """A network that says something of each place and context: untrained, but not flat."""
    network = MaskedTransformer(
        CODEC.vocabulary, pad=CODEC.pad, width=16, depth=1, heads=2, generator=seeded(seed)
    )
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "attended" in name or "last" in name:
                weight.mul_(scale)
    return TextPrior(frame, network.requires_grad_(False).eval(), LEVELS, {})


def reward(gaps: Any) -> Tensor:
    """Words of the gap that are as what follows it begins, or as its left context."""
    return torch.tensor(
        [
            1.5 * gap.middle.split().count(gap.right[:1]) - gap.middle.split().count(gap.left[:1])
            for gap in gaps
        ]
    )


TUNED = FinetuneSettings(
    updates=4,
    beta_warmup=1,
    conditions=8,
    mix=Mix(on_policy=8, data=0),
    levels_per_path=None,
    learning_rate=5e-3,
    average_decay=0.95,
)
SETTINGS = TextPosteriorSettings(finetune=TUNED, log_every=2, text_every=2)


def ratios(prior: TextPrior, gaps: list[Gap], settings: TextPosteriorSettings) -> Tensor:
    """Log-ratios of paths of the untrained posterior over the prior."""
    task, _ = text_task(prior, Prompts.of(prior.frame, gaps), reward, settings)
    condition, _ = task.draw_conditions(200, generator=seeded())
    _, ratio = rollout_against(
        task.diffusion, task.posterior, task.prior, condition, 200, generator=seeded()
    )
    return ratio


@pytest.mark.parametrize("rank", [None, 2], ids=["copy", "adapters"])
def test_without_right_context_the_posterior_starts_as_the_prior(rank):
    settings = replace(SETTINGS, lora_rank=rank)
    assert ratios(new_prior(), ALONE, settings).abs().max() < 1e-5


@pytest.mark.parametrize("rank", [None, 2], ids=["copy", "adapters"])
def test_the_posterior_starts_as_the_prior_though_more_is_shown_to_it(rank):
    settings = replace(SETTINGS, lora_rank=rank)
    assert ratios(new_prior(), GAPS, settings).abs().max() < 1e-5
    prior = new_prior()
    condition = Prompts.of(FRAME, GAPS).condition
    x, level = (
        prior.diffusion.start(len(GAPS), generator=seeded()),
        torch.full((len(GAPS),), LEVELS),
    )
    with torch.no_grad():
        left, both = (d(x, level, condition) for d in (prior.left_only(), prior.both_sides()))
    assert (left - both).nan_to_num().abs().max() > 0.01  # what is shown would make a difference


def test_every_slot_counts_in_the_reward_s_own_gap():
    prior, prompts = new_prior(), Prompts.of(FRAME, GAPS)
    task, _ = text_task(prior, prompts, reward, SETTINGS)
    condition, _ = task.draw_conditions(50, generator=seeded())
    x0 = torch.tensor(IDS)[torch.randint(3, (50, 2), generator=seeded())]
    found = task.log_reward(x0, condition)
    for i, row in enumerate(condition["row"].tolist()):
        text = " ".join("abc"[IDS.index(token)] for token in x0[i].tolist())
        assert float(found[i]) == float(reward([GAPS[row]._replace(middle=text)]))


def chain_law(prior: TextPrior, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """All pairs of words, and their log-probabilities for each row: [9, 2], [rows, 9].

    Each slot is revealed in one of the steps, uniformly: together with the other, before, or after.
    """
    pairs = torch.tensor(list(itertools.product(IDS, repeat=2)))
    rows, denoiser = len(condition["tokens"]), prior.left_only()
    level = torch.ones(rows, dtype=torch.int64)

    def law(first: int, second: int) -> Tensor:
        x = torch.tensor([[first, second]]).expand(rows, -1)
        with torch.no_grad():
            return denoiser(x, level, condition).double()

    both = law(CODEC.mask, CODEC.mask)
    together, found = 1 / prior.levels, []
    for first, second in pairs.tolist():
        one, two = both[:, 0, first].exp(), both[:, 1, second].exp()
        after_one = law(first, CODEC.mask)[:, 1, second].exp()
        after_two = law(CODEC.mask, second)[:, 0, first].exp()
        apart = (one * after_one + two * after_two) / 2
        found.append(together * one * two + (1 - together) * apart)
    return pairs, torch.stack(found, 1).log()


def known_log_z(prior: TextPrior, prompts: Prompts) -> Tensor:
    """log Z of each gap, by enumeration."""
    pairs, log_prob = chain_law(prior, prompts.condition)
    log_reward = token_log_reward(reward, prompts)
    each = [log_reward(pair.expand(len(log_prob), -1), prompts.condition) for pair in pairs]
    return (log_prob + torch.stack(each, 1)).logsumexp(1)


def weights(found: Any, prior: TextPrior, prompts: Prompts, n: int) -> Tensor:
    """Log-weights of paths of a posterior: [gaps, n]."""
    each = {name: tensor.repeat_interleave(n, 0) for name, tensor in prompts.condition.items()}
    task, rows = found.task, len(each["row"])
    path, ratio = rollout_against(
        task.diffusion,
        task.posterior,
        OnDemand(prior.left_only()),
        each,
        rows,
        generator=seeded(1),
    )
    return log_weight(task.log_reward(path.x0, each), ratio, 1.0).double().reshape(-1, n)


def test_the_enumerated_law_is_that_of_the_prior_s_chain():
    prior, prompts, n = new_prior(), Prompts.of(FRAME, GAPS[:1]), 20_000
    pairs, log_prob = chain_law(prior, prompts.condition)
    assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-6)
    each = {
        name: tensor.expand(n, -1) for name, tensor in prompts.condition.items() if name != "row"
    }
    path, _ = rollout_against(
        prior.diffusion,
        OnDemand(prior.left_only()),
        OnDemand(prior.left_only()),
        each,
        n,
        generator=seeded(),
    )
    seen = (path.x0[:, None] == pairs).all(2).double().mean(0)
    law = log_prob[0].exp()
    assert bool(((seen - law).abs() < 4.5 * (law * (1 - law) / n).sqrt()).all())
    assert law.max() > 2 * law.min()


@pytest.mark.parametrize("make", ["groups", "network"])
def test_trajectory_balance_finds_log_z(make, tmp_path):
    """ELBO and importance-weighted log Z of sixteen gaps against enumeration."""
    prior, prompts = new_prior(), Prompts.of(FRAME, GAPS)
    learned = make == "network"
    tuned = replace(TUNED, updates=250, last_learning_rate=0.05, log_z_learning_rate=2e-2)
    trainer = relative_trajectory_balance(network_log_z) if learned else None
    found = fit_text_posterior(
        tmp_path / "posterior",
        prior,
        prompts,
        reward,
        replace(SETTINGS, finetune=tuned, log_every=50, text_every=50),
        make_trainer=trainer,
    )
    log_z = known_log_z(prior, prompts)
    assert log_z.std() > 0.2
    task, network = text_task(prior, prompts, reward, SETTINGS)
    start = weights(replace(found, task=task, network=network), prior, prompts, 400)
    end = weights(found, prior, prompts, 400)
    before, after = log_z - elbo(start), log_z - elbo(end)
    assert before.mean() > 0.3
    assert 0 < after.mean() < 0.06 and after.max() < 0.15
    error = (importance_log_z(end)[0] - log_z).abs()
    assert error.mean() < 0.02
    assert found.results["network_calls"] > 0


def test_the_posterior_of_the_wrong_prior_would_be_noticed():
    """The prior of the weights is that of the enumeration: with another, log Z is another."""
    prompts = Prompts.of(FRAME, GAPS)
    one, other = (known_log_z(new_prior(seed=seed), prompts) for seed in (0, 1))
    assert (one - other).abs().mean() > 0.05


def fit(directory, make: MakeTrainer | None = None, *, prior=None, gaps=GAPS, **given: Any) -> Any:
    prior = prior or new_prior()
    settings = replace(
        SETTINGS,
        supervised=PretrainSettings(steps=60, batch=32, learning_rate=1e-2, average_decay=0.9),
        denoising=replace(
            SETTINGS.denoising,
            updates=60,
            conditions=8,
            paths=4,
            refresh=5,
            learning_rate=5e-3,
            log_z_learning_rate=1e-2,
            average_decay=0.9,
        ),
    )
    prompts = Prompts.of(prior.frame, gaps)
    settings = replace(settings, **given)
    return fit_text_posterior(directory, prior, prompts, reward, settings, make_trainer=make)


def test_denoising_posterior_prediction_raises_the_bound(tmp_path):
    prior, prompts = new_prior(), Prompts.of(FRAME, GAPS)
    found = fit(tmp_path / "ddpp", denoising_posterior(SETTINGS.denoising))
    task, network = text_task(prior, prompts, reward, SETTINGS)
    start = weights(replace(found, task=task, network=network), prior, prompts, 100)
    end = weights(found, prior, prompts, 100)
    assert float(elbo(end).mean()) > float(elbo(start).mean()) + 0.1


def test_log_z_of_denoising_posteriors_begins_at_the_baseline(tmp_path):
    """Gaps whose rewards differ by hundreds of nats: a guess for each, from prior draws, is met."""
    prior = new_prior()
    prompts = Prompts.of(FRAME, GAPS)
    levels = torch.arange(len(GAPS)) * 100.0
    far = Prompts.of(FRAME, GAPS).with_baseline(levels)
    x0 = torch.zeros((len(GAPS), 3, FRAME.slots), dtype=torch.int64) + IDS[0]
    pool = ImportanceReference(x0, levels.double()[:, None].expand(-1, 3))
    settings = replace(SETTINGS.denoising, updates=1, refresh=1000)
    losses = []
    for given in (prompts, far):
        task, _ = text_task(prior, given, lambda gaps: torch.zeros(len(gaps)), SETTINGS)
        maker = denoising_posterior(settings, pool)
        trainer, _ = maker(task, given, SETTINGS, seeded())
        trainer.replay.load_state_dict(trainer.replay.state_dict())  # of the pool alone
        trainer._remember = lambda: None
        losses.append(float(trainer.update(0)["ddpp/loss"]))
    assert losses[1] < 1 < losses[0] / 100


def test_a_start_comes_first_and_is_kept(tmp_path):
    """RTB goes on from what the start left, and what both cost is added up."""
    prior, prompts = new_prior(), Prompts.of(FRAME, GAPS)
    started = denoising_posterior(SETTINGS.denoising)
    given = (tmp_path / "both", prior, prompts, reward, SETTINGS)
    both = fit_text_posterior(*given, start=started)
    stage = json.loads((tmp_path / "both" / "start" / "results.json").read_text())
    alone = fit_text_posterior(tmp_path / "alone", *given[1:])
    assert (
        both.results["network_calls"]
        > alone.results["network_calls"] + 0.5 * stage["network_calls"]
    )
    assert any(
        not torch.equal(a, b)
        for a, b in zip(both.network.parameters(), alone.network.parameters(), strict=True)
    )
    (tmp_path / "both" / "results.json").unlink()
    again = fit_text_posterior(*given, start=started)
    assert fingerprint(again.network) == fingerprint(both.network)


def test_supervised_training_learns_what_was_there(tmp_path):
    """Here always 'a b': the law of what people write becomes that."""
    gaps = [gap._replace(middle="a b") for gap in GAPS]
    found = fit(tmp_path / "supervised", supervised, gaps=gaps)
    prompts = Prompts.of(FRAME, gaps)
    for denoiser, least, most in ((found.task.prior, 0, 0.3), (found.task.posterior, 0.8, 1.1)):
        path, _ = rollout_against(
            found.task.diffusion,
            denoiser,
            found.task.prior,
            {
                name: tensor.repeat(20, *[1] * (tensor.ndim - 1))
                for name, tensor in prompts.condition.items()
            },
            20 * len(gaps),
            generator=seeded(),
        )
        share = (path.x0 == torch.tensor(IDS[:2])).all(1).double().mean()
        assert least <= float(share) < most


@pytest.mark.parametrize("make", [None, supervised, denoising_posterior(SETTINGS.denoising)])
def test_adapters_train_alone(make, tmp_path):
    """The prior stays as it is, to the last bit, and its weights are not copied."""
    prior = new_prior()
    before = fingerprint(prior.network)
    found = fit(tmp_path / "adapters", make, prior=prior, lora_rank=2)
    assert fingerprint(prior.network) == before
    shared = {id(parameter) for parameter in prior.network.parameters()}
    own = {name: p for name, p in found.network.named_parameters() if id(p) not in shared}
    assert own and all("lora_" in name or "gate" in name for name in own)
    assert len(list(found.network.parameters())) == len(own) + len(shared)
    moved = [name for name, p in own.items() if "lora_B" in name and bool((p != 0).any())]
    assert len(moved) == 2  # query_key_value and attended
    condition = Prompts.of(FRAME, GAPS).condition
    x, level = (
        prior.diffusion.start(len(GAPS), generator=seeded()),
        torch.full((len(GAPS),), LEVELS),
    )
    chosen = torch.ones_like(x, dtype=torch.bool)
    with torch.no_grad():
        alone = prior.left_only()(x, level, condition)[chosen]
        seen = found.task.prior(x, level, condition)[chosen]
        trained = found.task.posterior(x, level, condition)[chosen]
    torch.testing.assert_close(seen, alone, rtol=1e-5, atol=1e-5)
    assert (trained - alone).nan_to_num().abs().max() > 1e-3


def test_a_full_copy_leaves_the_prior_as_it_is(tmp_path):
    prior = new_prior()
    before = fingerprint(prior.network)
    found = fit(tmp_path / "copy", prior=prior)
    assert fingerprint(prior.network) == before
    assert {id(p) for p in prior.network.parameters()}.isdisjoint(
        map(id, found.network.parameters())
    )
    assert not any(p.requires_grad for p in found.network.parameters())


@pytest.mark.parametrize("rank", [None, 2], ids=["copy", "adapters"])
def test_a_second_call_loads_what_the_first_trained(rank, tmp_path, monkeypatch):
    first = fit(tmp_path / "posterior", lora_rank=rank)
    monkeypatch.setattr(posterior_module, "train", lambda *a, **k: pytest.fail("trained again"))
    again = fit(tmp_path / "posterior", lora_rank=rank)
    for one, other in zip(first.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert again.results["network_calls"] == first.results["network_calls"]
    with pytest.raises(InputError, match="gaps was 16 and is now 15"):
        fit(tmp_path / "posterior", lora_rank=rank, gaps=GAPS[1:])
    with pytest.raises(InputError, match="prior was"):
        fit(tmp_path / "posterior", lora_rank=rank, prior=new_prior(seed=1))


@pytest.mark.parametrize("rank", [None, 2], ids=["copy", "adapters"])
@pytest.mark.parametrize("learned", [False, True], ids=["groups", "network"])
def test_an_interruption_changes_no_bit(rank, learned, tmp_path, monkeypatch):
    def train(*arguments, **given):
        return loop.train(*arguments, **{**given, "checkpoint_every": 2})

    def run(name):
        maker = relative_trajectory_balance(network_log_z) if learned else None
        return fit(tmp_path / name, maker, lora_rank=rank)

    update, seen = Finetuner.update, []

    def stop(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return update(self, step)

    def watch(self, step):
        seen.append(step)
        return update(self, step)

    whole = run("whole")
    monkeypatch.setattr(posterior_module, "train", train)
    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    monkeypatch.setattr(Finetuner, "update", watch)
    cut = run("cut")
    assert seen == [2, 3]
    assert cut.results["network_calls"] == whole.results["network_calls"] > 0
    for name in ("model.safetensors", "metrics.jsonl"):
        one, other = (tmp_path / side / name for side in ("whole", "cut"))
        assert one.read_bytes() == other.read_bytes(), name


def test_network_calls_are_the_rows_that_went_through_the_networks(tmp_path, monkeypatch):
    """Three for a row whose gradient is kept; infills that are only shown are not counted."""
    counted = {"rows": 0}
    prior = new_prior()
    kind = type(prior.network.trunk)
    forward = kind.forward

    def count(self, tokens, *more):
        counted["rows"] += len(tokens) * (3 if torch.is_grad_enabled() else 1)
        return forward(self, tokens, *more)

    def uncounted(*arguments, **given):
        before = counted["rows"]
        shown(*arguments, **given)
        counted["rows"] = before

    shown = posterior_module.log_infills
    monkeypatch.setattr(posterior_module, "log_infills", uncounted)
    check = posterior_module._check_reward

    def before_training(*arguments):
        check(*arguments)
        counted["rows"] = 0

    monkeypatch.setattr(posterior_module, "_check_reward", before_training)
    monkeypatch.setattr(kind, "forward", count)
    found = fit(tmp_path / "counted", prior=prior)
    assert found.results["network_calls"] == counted["rows"] > 100
    for network in (prior.network, found.network):  # nothing goes on counting
        assert not any(module._forward_pre_hooks for module in network.modules())


def test_infills_are_logged_as_text(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tmp_path / "posterior")
    events = EventAccumulator(str(tmp_path / "posterior")).Reload()
    (tag,) = events.Tags()["tensors"]
    assert tag.startswith("infills")
    texts = events.Tensors(tag)
    assert [event.step for event in texts] == [2, 4]
    text = texts[-1].tensor_proto.string_val[0].decode()
    lines = text.split("\n\n")
    assert len(lines) == posterior_module.SHOWN
    for line in lines:
        left, middle, right = line.split("**")
        assert (left.strip(), right.strip()) in {(gap.left, gap.right) for gap in GAPS}
        assert set(middle.split()) <= set("abc")


def condition_of(gaps: list[Gap], frame: Frame = FRAME) -> dict[str, Tensor]:
    return Prompts.of(frame, gaps).condition


def value_network(frame: Frame = FRAME) -> ContextValue:
    value = ContextValue(frame, width=8, generator=seeded())
    last = value.layers[-1]
    assert isinstance(last, nn.Linear) and not last.weight.any() and not last.bias.any()
    nn.init.normal_(last.weight, generator=seeded(1))
    return value


def test_log_z_of_a_context_starts_at_zero_and_depends_on_both_sides_and_the_length():
    start = ContextValue(FRAME, width=8, generator=seeded())
    assert not start(condition_of(GAPS)).any()
    value = value_network()
    one, left, right, longer = value(
        condition_of(
            [Gap("a", "b", "c"), Gap("b", "b", "c"), Gap("a", "c", "c"), Gap("a", "b", "c c")]
        )
    ).tolist()
    assert len({round(number, 5) for number in (one, left, right, longer)}) == 4


def test_log_z_of_a_context_does_not_depend_on_padding_or_on_what_was_there():
    value = value_network()
    wide = ContextValue(Frame(CODEC, slots=4, window=9), width=8, generator=seeded())
    wide.load_state_dict(value.state_dict())
    gaps = [Gap("a", "b a", "c"), Gap("b c", "", "a b")]
    narrow = value(condition_of(gaps))
    torch.testing.assert_close(wide(condition_of(gaps, Frame(CODEC, 4, 9))), narrow)
    other = value(condition_of([gap._replace(middle=gap.middle[::-1]) for gap in gaps]))
    torch.testing.assert_close(other, narrow)


def test_log_z_of_a_noisy_gap_depends_on_what_is_revealed():
    value, condition = value_network(), condition_of(GAPS[:1])
    a, b, _ = IDS
    found = [
        float(value(condition, torch.tensor([point])).detach())
        for point in ([CODEC.mask, CODEC.mask], [a, CODEC.mask], [b, CODEC.mask], [a, b])
    ]
    assert len({round(number, 5) for number in found}) == 4
    assert found[0] == pytest.approx(float(value(condition).detach()), abs=1e-6)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(save_bert(tmp_path_factory.mktemp("bert") / "model", [WORDS]))


def hub_prior(source: str) -> TextPrior:
    return foreign_prior(source, levels=LEVELS, slots=2, window=5)


@pytest.mark.parametrize("rank", [None, 2], ids=["copy", "adapters"])
def test_a_hub_model_s_posterior_starts_as_the_prior_and_trains(bert, rank, tmp_path):
    prior = hub_prior(bert)
    prior.network.requires_grad_(False)
    settings = replace(SETTINGS, lora_rank=rank, lora_targets=("query", "value"))
    assert ratios(prior, ALONE, settings).abs().max() < 1e-4
    assert ratios(prior, GAPS, settings).abs().max() < 1e-4
    found = fit_text_posterior(
        tmp_path / "posterior", prior, Prompts.of(prior.frame, GAPS), reward, settings
    )
    saved = load_file(tmp_path / "posterior" / "model.safetensors")
    if rank:  # also of tied weights, which have two names
        assert all("lora_" in name or "gate" in name for name in saved)
    records = (tmp_path / "posterior" / "metrics.jsonl").read_text().splitlines()
    assert len(records) == 2 and all(
        torch.tensor(list(map(float, json.loads(line).values()))).isfinite().all()
        for line in records
    )
    start, _ = text_task(prior, Prompts.of(prior.frame, GAPS), reward, settings)
    trained = [p for p in start.posterior.parameters() if p.requires_grad]
    assert len(trained) == (5 if rank else 2 + len(list(prior.network.parameters())) - 1)
    moved = [
        not torch.equal(one, other)
        for one, other in zip(
            start.posterior.parameters(), found.task.posterior.parameters(), strict=True
        )
    ]
    assert sum(moved) >= (3 if rank else 10)


def test_the_gate_of_any_network_is_where_the_network_is():
    network = nn.Linear(2, 2, device="meta")
    gate = fading(network, 0).gate
    assert isinstance(gate, Tensor) and gate.device.type == "meta"


def test_adapters_need_layers_of_these_names(bert, tmp_path):
    prior = hub_prior(bert)
    with pytest.raises(InputError, match="is named query_key_value or attended"):
        text_task(prior, Prompts.of(prior.frame, GAPS), reward, replace(SETTINGS, lora_rank=2))


@pytest.mark.parametrize("pad", ["[PAD]", "[SEP]"])
def test_what_a_hub_model_says_of_a_row_does_not_depend_on_the_others(pad, tmp_path):
    """Also where what fills up has a meaning, such as the end of a text, and is seen."""
    prior = hub_prior(str(save_bert(tmp_path / "bert", [WORDS], pad_token=pad)))
    codec = prior.frame.codec
    prompts = Prompts.of(prior.frame, [Gap("a", "", "c"), Gap("a b", "c", "a b")])
    x, level = torch.full((2, 2), codec.mask), torch.ones(2, dtype=torch.int64)
    one = {name: tensor[:1] for name, tensor in prompts.condition.items()}
    with torch.no_grad():
        for denoiser in (prior.left_only(), prior.both_sides()):
            together = denoiser(x, level, prompts.condition)[:1]
            torch.testing.assert_close(denoiser(x[:1], level[:1], one), together)
