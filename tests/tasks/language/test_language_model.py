"""Likelihoods of texts against sums by hand and against transformers; samples against the law."""

import json
import math

import pytest
import torch
from hub_models import save_gpt2
from torch import Generator, Tensor, nn
from transformers import AutoModelForCausalLM

from rtb_rl.errors import InputError
from rtb_rl.nn.transformer import CausalTransformer
from rtb_rl.tasks.language import language_model_training as training
from rtb_rl.tasks.language.codec import train_byte_codec, train_word_codec
from rtb_rl.tasks.language.foreign import foreign_language_model
from rtb_rl.tasks.language.language_model import LanguageModel, in_batch
from rtb_rl.tasks.language.language_model_training import (
    LanguageModelSettings,
    LanguageModelTrainer,
    fit_language_model,
    token_loss,
)
from rtb_rl.tasks.language.texts import load_texts
from rtb_rl.training import loop

STORIES = load_texts("grammar").stories[:60]
TEXTS = [" ".join(story) for story in STORIES]
CODEC = train_word_codec(TEXTS, 300)
TINY = LanguageModelSettings(width=16, depth=1, heads=2, steps=6, batch=8, choose_every=2)
BEFORE = ["Anna had a dog.", "", "But it rained the whole morning. So they took an umbrella."]
AFTER = ["It was gone.", "Tom was ready for the big race.", "The answer came"]


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def causal(vocabulary: int, scale: float = 1.0) -> CausalTransformer:
    network = CausalTransformer(vocabulary, width=16, depth=1, heads=2, generator=seeded())
    with torch.no_grad():
        network.bias.copy_(scale * torch.randn(vocabulary, generator=seeded(1)))
    return network


MODEL = LanguageModel(causal(CODEC.vocabulary), CODEC)


def by_hand(model: LanguageModel, before: str, text: str) -> float:
    """One sequence alone, one token after the other, from the logits of everything."""
    (left,), (then,) = model.codec.encode([before]), model.codec.encode([f" {text}"])
    tokens = torch.tensor([[model.codec.end, *left, *then]])
    with torch.no_grad():
        logits = model.network(tokens)[0].double()
    total = 0.0
    for place in range(len(left), len(left) + len(then)):
        following = int(tokens[0, place + 1])
        total += float(logits[place, following] - logits[place].logsumexp(0))
    return total


def test_likelihoods_are_sums_over_the_tokens_of_the_text():
    found = MODEL.log_prob(BEFORE, AFTER)
    assert found.shape == (3,) and found.dtype == torch.float32
    for value, before, after in zip(found.tolist(), BEFORE, AFTER, strict=True):
        assert value == pytest.approx(by_hand(MODEL, before, after), abs=1e-3)
        assert value < -10


def test_what_is_likely_after_one_text_and_another_adds_up():
    """log p(ab | c) = log p(a | c) + log p(b | ca)."""
    c, a, b = "Anna had a dog.", "It was gone. She looked", "in the forest."
    whole, first = MODEL.log_prob([c, c], [f"{a} {b}", a])
    (second,) = MODEL.log_prob([f"{c} {a}"], [b])
    assert float(whole) == pytest.approx(float(first + second), abs=1e-3)
    (alone,) = MODEL.log_prob([c], [b])
    assert abs(float(alone - second)) > 1e-3


def test_the_chain_rule_holds_for_bytes():
    codec = train_byte_codec(TEXTS, 300)
    model = LanguageModel(causal(codec.vocabulary), codec)
    c, a, b = "Anna had", "a dog", "in the forest"
    whole, first = model.log_prob([c, c], [f"{a} {b}", a])
    (second,) = model.log_prob([f"{c} {a}"], [b])
    assert float(whole) == pytest.approx(float(first + second), abs=1e-3)


def test_a_likelihood_does_not_depend_on_what_else_is_asked(monkeypatch):
    before = [" ".join(story[:2]) for story in STORIES[:30]]
    after = [story[2 + i % 3] for i, story in enumerate(STORIES[:30])]
    together = MODEL.log_prob(before, after)
    alone = torch.cat([MODEL.log_prob([b], [a]) for b, a in zip(before, after, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-3)
    monkeypatch.setattr("rtb_rl.tasks.language.language_model.ROWS", 7)
    in_parts = MODEL.log_prob(before, after)
    torch.testing.assert_close(in_parts, alone, rtol=1e-5, atol=1e-3)


def test_all_texts_of_one_token_make_up_certainty():
    """The law of the next token sums to one over a vocabulary of four."""
    codec = train_word_codec(["a b"], 6)
    model = LanguageModel(causal(codec.vocabulary), codec)
    found = model.log_prob(["a"] * 2, ["a", "b"]).double().exp().sum()
    tokens = torch.tensor([[codec.end, *codec.encode(["a"])[0]]])
    with torch.no_grad():
        special = model.network(tokens)[0, -1].softmax(-1)[:4].sum()
    assert float(found + special) == pytest.approx(1, abs=1e-5)


def test_perplexity_is_that_of_a_token():
    counts = [len(row) for row in CODEC.encode(AFTER)]
    total = sum(by_hand(MODEL, b, a) for b, a in zip(BEFORE, AFTER, strict=True))
    wanted = math.exp(-total / sum(counts))
    assert MODEL.perplexity(BEFORE, AFTER) == pytest.approx(wanted, rel=1e-4)


def test_the_perplexity_of_a_coin_is_two():
    class Coin(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.full((6,), -100.0))

        def at(self, tokens: Tensor, row: Tensor, place: Tensor) -> Tensor:
            return self.bias.index_fill(0, torch.tensor([4, 5]), 0.0).expand(len(row), -1)

    model = LanguageModel(Coin(), train_word_codec(["a b"], 6))
    assert model.perplexity(["a", "b"], ["a b a", "b"]) == pytest.approx(2)
    assert model.perplexity(["a", "b", "a"], ["a b a", "", "b"]) == pytest.approx(2)


def test_texts_without_tokens_have_no_perplexity():
    assert MODEL.perplexity(BEFORE, ["", AFTER[1], " "]) == pytest.approx(
        MODEL.perplexity(BEFORE[1:2], AFTER[1:2])
    )
    with pytest.raises(InputError, match="2 texts without a token have no perplexity"):
        MODEL.perplexity(["a", "b"], ["", " "])


def test_samples_are_as_long_as_asked_for_and_hold_no_special_token():
    before, lengths = TEXTS[:40], [1 + i % 7 for i in range(40)]
    texts = MODEL.sample(before, lengths, generator=seeded())
    rows = CODEC.encode(texts)
    assert [len(row) for row in rows] == lengths
    drawn = {token for row in rows for token in row}
    assert drawn.isdisjoint({*CODEC.never, CODEC.end}) and len(drawn) > 30
    assert texts == MODEL.sample(before, lengths, generator=seeded())
    assert texts != MODEL.sample(before, lengths, generator=seeded(1))


def test_samples_follow_the_law():
    """Of two tokens out of three, after a text: nine frequencies against products of softmaxes."""
    codec = train_word_codec(["a b c"], 7)
    model, n = LanguageModel(causal(codec.vocabulary), codec), 20_000
    texts = model.sample(["c a"] * n, [2] * n, generator=seeded())
    names, allowed = "abc", [codec.encode([name])[0][0] for name in "abc"]
    left = [codec.end, *codec.encode(["c a"])[0]]
    with torch.no_grad():
        first = model.network(torch.tensor([left]))[0, -1, allowed].double().softmax(0)
        chi_square = 0.0
        for one, token in enumerate(allowed):
            after = model.network(torch.tensor([[*left, token]]))[0, -1, allowed].double()
            for two, probability in enumerate((first[one] * after.softmax(0)).tolist()):
                seen = texts.count(f"{names[one]} {names[two]}")
                chi_square += (seen - n * probability) ** 2 / (n * probability)
    assert first.max() > 1.3 * first.min()
    assert chi_square < 26.1  # 99.9 % of a chi-square with 8 degrees of freedom


def test_texts_that_can_not_be_scored():
    narrow = LanguageModel(MODEL.network, CODEC, window=8)
    with pytest.raises(InputError, match="the text '', whose .* has no tokens"):
        MODEL.log_prob(["a"], [""])
    five, three = "anna had a dog.", "it was gone"
    assert narrow.log_prob([five], [three]).shape == (1,)
    with pytest.raises(InputError, match="a text of 9 tokens is longer than the 8"):
        narrow.log_prob([five], [f"{three}."])
    assert len(narrow.sample([five], [3], generator=seeded())) == 1
    with pytest.raises(InputError, match="a text of 9 tokens is longer than the 8"):
        narrow.sample([five], [4], generator=seeded())


def test_a_batch_begins_with_the_end_token_and_is_padded():
    tokens = in_batch([[5, 6], [7]], CODEC)
    assert tokens.tolist() == [[CODEC.end, 5, 6], [CODEC.end, 7, CODEC.pad]]


def test_padding_is_no_part_of_the_loss():
    network = MODEL.network
    tokens = in_batch(CODEC.encode(TEXTS[:1]), CODEC)
    longer = torch.cat([tokens, torch.zeros(1, 9, dtype=torch.int64)], 1)
    with torch.no_grad():
        losses = [token_loss(network(each), each, CODEC.pad) for each in (tokens, longer)]
    torch.testing.assert_close(*losses)
    (whole,) = MODEL.log_prob([""], TEXTS[:1])
    count = len(CODEC.encode(TEXTS[:1])[0])
    assert float(losses[0]) == pytest.approx(-float(whole) / count, rel=1e-4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "whole"
    return fit_language_model(directory, CODEC, STORIES, TINY, seed=1), directory


def losses_of(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    name = "language_model/held_out_loss"
    return [record[name] for record in map(json.loads, lines) if name in record]


def held_out(model: LanguageModel, stories) -> float:
    """Nats a token of whole stories with their ends."""
    tokens = in_batch(
        [[*row, CODEC.end] for row in CODEC.encode([" ".join(story) for story in stories])], CODEC
    )
    with torch.no_grad():
        return float(token_loss(model.network(tokens), tokens, CODEC.pad))


def test_training_keeps_the_weights_that_are_best_on_stories_held_out(tmp_path):
    """Few stories at a high rate: the loss of others falls, then rises again."""
    settings = LanguageModelSettings(
        width=32,
        depth=1,
        heads=2,
        steps=160,
        batch=16,
        learning_rate=2e-2,
        average_decay=0.9,
        token_dropout=0.0,
        choose_every=10,
    )
    model = fit_language_model(tmp_path / "model", CODEC, STORIES, settings)
    losses = losses_of(tmp_path / "model")
    best = min(losses)
    assert losses.index(best) not in (0, len(losses) - 1) and losses[-1] > best + 0.02
    assert losses[0] > best + 0.5
    held = STORIES[:6]  # a tenth of them
    assert held_out(model, held) == pytest.approx(best, abs=1e-4)
    results = json.loads((tmp_path / "model" / "results.json").read_text())
    assert results["held_out_nats"] == pytest.approx(best, abs=1e-6)
    assert results["perplexity"] == pytest.approx(math.exp(best), abs=1e-6)


def test_an_untrained_model_costs_about_log_v_a_token():
    network = causal(CODEC.vocabulary, scale=0.0)
    with torch.no_grad():
        network.trunk.tokens.weight.mul_(1e-3)
    assert held_out(LanguageModel(network, CODEC), STORIES) == pytest.approx(
        math.log(CODEC.vocabulary), rel=1e-2
    )


def test_a_second_call_loads_what_the_first_trained(whole, monkeypatch):
    model, directory = whole
    monkeypatch.setattr(training, "train", lambda *a, **k: pytest.fail("trained again"))
    again = fit_language_model(directory, CODEC, STORIES, TINY, seed=1)
    assert torch.equal(again.log_prob(BEFORE, AFTER), model.log_prob(BEFORE, AFTER))
    with pytest.raises(InputError, match="seed was 1 and is now 2"):
        fit_language_model(directory, CODEC, STORIES, TINY, seed=2)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_interruption_changes_no_bit(sign, tmp_path, monkeypatch):
    """Also where the best weights are older than it: with losses of the other sign, the first."""
    directory, offer = tmp_path / "whole", training.Best.offer
    monkeypatch.setattr(
        training.Best, "offer", lambda self, network, loss: offer(self, network, sign * loss)
    )
    fit_language_model(directory, CODEC, STORIES, TINY, seed=1)
    losses = losses_of(directory)
    assert losses == sorted(losses, reverse=True) and len(losses) == 3

    def train(*arguments, **given):
        return loop.train(*arguments, **{**given, "checkpoint_every": 2})

    update, seen = LanguageModelTrainer.update, []

    def stop(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return update(self, step)

    def watch(self, step):
        seen.append(step)
        return update(self, step)

    monkeypatch.setattr(training, "train", train)
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelTrainer, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            fit_language_model(tmp_path / "cut", CODEC, STORIES, TINY, seed=1)
    monkeypatch.setattr(LanguageModelTrainer, "update", watch)
    fit_language_model(tmp_path / "cut", CODEC, STORIES, TINY, seed=1)
    assert seen == [2, 3, 4, 5]
    name = "model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (directory / name).read_bytes()
    assert losses_of(tmp_path / "cut") == losses_of(directory)


def test_seeds_make_other_models(whole, tmp_path):
    model, _ = whole
    other = fit_language_model(tmp_path / "other", CODEC, STORIES, TINY, seed=2)
    assert not torch.equal(other.log_prob(BEFORE, AFTER), model.log_prob(BEFORE, AFTER))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("gpt2") / "model", TEXTS, window=96, extra_rows=5)


def test_a_foreign_model_says_what_transformers_says(gpt2):
    model = foreign_language_model(str(gpt2))
    assert model.window == 96
    found = model.log_prob(BEFORE, AFTER).tolist()
    plain = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    for value, before, after in zip(found, BEFORE, AFTER, strict=True):
        (left,), (then,) = model.codec.encode([before]), model.codec.encode([f" {after}"])
        tokens = torch.tensor([[model.codec.end, *left, *then]])
        labels = tokens.clone()
        labels[0, : 1 + len(left)] = -100
        with torch.no_grad():
            loss = plain(input_ids=tokens, labels=labels).loss
        assert value == pytest.approx(-float(loss) * len(then), rel=1e-4)


def test_a_foreign_model_reads_its_window_to_the_last_token(gpt2):
    model = foreign_language_model(str(gpt2))
    word = " a"
    assert len(model.codec.encode([word])[0]) == 1
    full = (word * 90)[1:]
    assert len(model.codec.encode([full])[0]) == 90
    assert model.log_prob([full], [(word * 6)[1:]]).isfinite().all()
    assert len(model.sample([full], [6], generator=seeded())) == 1
    with pytest.raises(InputError, match="a text of 97 tokens is longer than the 96"):
        model.log_prob([full], [(word * 7)[1:]])


def test_a_foreign_model_draws_no_row_that_no_token_has(gpt2):
    """Networks often have more rows than the tokenizer has tokens."""
    model = foreign_language_model(str(gpt2))
    with torch.no_grad():
        model.network.model.transformer.wte.weight[-5:] *= 20
    drawn = []
    model.network.register_forward_hook(lambda module, given, output: drawn.append(given[0]))
    model.sample(["Anna had"] * 100, [3] * 100, generator=seeded())
    assert int(torch.cat([each.flatten() for each in drawn]).max()) < len(model.codec.tokenizer)
