"""Log-rewards of texts: against sums by hand, against transformers, and what is refused."""

import math
import sys
import textwrap

import pytest
import torch
from hub_models import classifier, save_gpt2
from torch import Generator

from rtb_rl.errors import InputError, NonFiniteError
from rtb_rl.nn.transformer import CausalTransformer, MaskedTransformer
from rtb_rl.tasks.language import rewards
from rtb_rl.tasks.language.codec import train_word_codec
from rtb_rl.tasks.language.denoiser import TextPrior
from rtb_rl.tasks.language.foreign import foreign_language_model
from rtb_rl.tasks.language.language_model import LanguageModel
from rtb_rl.tasks.language.named_rewards import named_reward
from rtb_rl.tasks.language.posterior import fit_text_posterior
from rtb_rl.tasks.language.prior import frame_for
from rtb_rl.tasks.language.prompts import Gap, Prompts, story_gaps
from rtb_rl.tasks.language.rewards import (
    ClassLikelihood,
    Contains,
    ContinuationLikelihood,
    WordCount,
    token_log_reward,
)
from rtb_rl.tasks.language.settings import TextSettings
from rtb_rl.tasks.language.texts import load_texts

STORIES = load_texts("grammar").stories[:40]
TEXTS = [" ".join(story) for story in STORIES]
CODEC = train_word_codec(TEXTS, 300)
GAPS = [
    Gap("Anna had a dog.", "It was gone.", "She played with it every day."),
    Gap("Tom was ready.", "He won the race.", "The prize was a red cup."),
]


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


MODEL = LanguageModel(
    CausalTransformer(CODEC.vocabulary, width=16, depth=1, heads=2, generator=seeded()), CODEC
)


def test_the_continuation_is_scored_given_all_that_comes_before_it():
    found = ContinuationLikelihood(MODEL)(GAPS)
    for value, gap in zip(found.tolist(), GAPS, strict=True):
        whole = f"{gap.left} {gap.middle}"
        assert value == float(MODEL.log_prob([whole], [gap.right]))
        (left,), (then,) = CODEC.encode([whole]), CODEC.encode([gap.right])
        tokens = torch.tensor([[CODEC.end, *left, *then]])
        with torch.no_grad():
            laws = MODEL.network(tokens)[0].log_softmax(-1)
        by_hand = sum(laws[len(left) + i, token] for i, token in enumerate(then))
        assert value == pytest.approx(float(by_hand), abs=1e-4)


def test_row_08_the_continuation_itself_is_scored():
    """Published code: the likelihood of left and middle, whatever follows; row 8 of the list."""
    reward = ContinuationLikelihood(MODEL)
    (plain,) = reward(GAPS[:1])
    for changed in (
        GAPS[0]._replace(right="It was not well."),
        GAPS[0]._replace(middle="It was her best friend."),
        GAPS[0]._replace(left="Mary had a dog."),
    ):
        assert float(reward([changed])) != float(plain)
    x, y = GAPS[0].left, GAPS[0].right
    (joint,) = MODEL.log_prob([x], [f"{GAPS[0].middle} {y}"])
    (middle,) = MODEL.log_prob([x], [GAPS[0].middle or ""])
    assert float(plain) == pytest.approx(float(joint - middle), abs=1e-3)


def test_an_empty_middle_leaves_no_trace():
    """Of bytes, two spaces are not one."""
    (found,) = ContinuationLikelihood(MODEL)([GAPS[0]._replace(middle="")])
    assert float(found) == float(MODEL.log_prob([GAPS[0].left], [GAPS[0].right]))


def test_a_language_model_may_have_a_tokenizer_of_its_own(tmp_path):
    """The prior's words are decoded, and tokenised anew as bytes."""
    model = foreign_language_model(str(save_gpt2(tmp_path / "gpt2", TEXTS)))
    frame = frame_for(CODEC, STORIES, ends=False)
    prompts = Prompts.of(frame, story_gaps(STORIES, 2))
    assert prompts.x0 is not None
    log_reward = token_log_reward(ContinuationLikelihood(model), prompts)
    found = log_reward(prompts.x0, prompts.condition)
    for i in (0, 7):
        story = STORIES[i]
        before = f"{' '.join(story[:2])} {story[2].lower()}"  # what the prior's codec says of it
        wanted = model.log_prob([before], [" ".join(story[3:])])
        assert float(found[i]) == pytest.approx(float(wanted), rel=1e-5)
    empty = ContinuationLikelihood(model)([Gap("Anna", "ran", "")])
    assert float(empty) == float(model.log_prob(["Anna"], ["ran"]))


def test_the_continuation_must_be_there():
    with pytest.raises(InputError, match=r"'Anna had a dog.'\.\.\. has no right context"):
        ContinuationLikelihood(MODEL)([GAPS[1], GAPS[0]._replace(right=" ")])


def test_rewards_of_points_are_those_of_their_texts():
    """A row of the condition is scored in its own gap, in any order."""
    frame = frame_for(CODEC, STORIES, ends=True)
    prompts = Prompts.of(frame, story_gaps(STORIES, 3))
    assert prompts.x0 is not None
    seen: list[Gap] = []

    def reward(gaps):
        seen.extend(gaps)
        return torch.arange(len(gaps)).double()

    index = torch.tensor([5, 0, 5, 9])
    condition = {name: tensor[index] for name, tensor in prompts.condition.items()}
    found = token_log_reward(reward, prompts)(prompts.x0[index], condition)
    assert found.tolist() == [0, 1, 2, 3]
    assert seen == [
        Gap(" ".join(STORIES[i][:3]), STORIES[i][4], STORIES[i][3].lower()) for i in index.tolist()
    ]


def test_words_that_are_lacking_have_a_price():
    gaps = [
        Gap("dog cat", "dog cat", middle)
        for middle in ("a Dog, and a cat.", "dog dog", "hotdog cats", "", None)
    ]
    found = Contains(("dog", "Cat"), price=3.0)(gaps)
    assert found.tolist() == [0, -3, -6, -6, -6]
    assert Contains(("it's",))([Gap("", "", "It\u2019s here")]).tolist() == [0]


def test_the_number_of_words_has_a_goal():
    """Punctuation marks are words; the log-density of a normal law without its constant."""
    gaps = [Gap("x", "y", middle) for middle in ("a b c", "a, b", "", "a b c d e")]
    assert WordCount(3)(gaps).tolist() == [0, 0, -4.5, -2]
    assert WordCount(3, width=2)(gaps).tolist() == [0, 0, -1.125, -0.5]


@pytest.mark.parametrize("rows", [256, 3])
def test_a_class_is_as_likely_as_the_classifier_says(rows, monkeypatch):
    """However many texts are looked at together."""
    monkeypatch.setattr(rewards, "ROWS", rows)
    model, tokenizer = classifier(TEXTS)
    gaps = [*GAPS, Gap("Anna had a dog.", "", None), Gap("Tom", "", "was ready.")]
    texts = [
        "Anna had a dog. She played with it every day. It was gone.",
        "Tom was ready. The prize was a red cup. He won the race.",
        "Anna had a dog.",
        "Tom was ready.",
    ]
    found = torch.stack([ClassLikelihood(model, tokenizer, label)(gaps) for label in range(3)])
    torch.testing.assert_close(found.exp().sum(0), torch.ones(4))
    for i, text in enumerate(texts):
        with torch.no_grad():  # alone, without padding
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        wanted = logits.double().exp() / logits.double().exp().sum()
        torch.testing.assert_close(found[:, i].double().exp(), wanted, rtol=1e-4, atol=1e-5)
    assert (found[:, 0] - found[:, 1]).abs().max() > 0.01


def named(reward: str, **given):
    return named_reward(TextSettings(reward=reward, **given))


def test_rewards_have_names(tmp_path, monkeypatch):
    assert named("story") is None
    assert named("contains:dog, Cat") == Contains(("dog", "cat"))
    assert named("words:7") == WordCount(7)
    assert named("words:7.5") == WordCount(7.5)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "rewards.py").write_text(
        textwrap.dedent("""
            import torch

            def short():
                return lambda gaps: -torch.tensor([float(len(gap.middle)) for gap in gaps])

            def none():
                return None
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = named("my_package.rewards:short")
    assert found is not None and found([Gap("a", "b", "xyz")]).tolist() == [-3]
    with pytest.raises(InputError, match=r"my_package.rewards:none\(\) returned NoneType, not a"):
        named("my_package.rewards:none")
    with pytest.raises(InputError, match="my_package.rewards:long can't be imported"):
        named("my_package.rewards:long")
    with pytest.raises(InputError, match="my_package.other:short can't be imported"):
        named("my_package.other:short")
    for name in [name for name in sys.modules if name.startswith("my_package")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "name", ["stories", "story:5", "contains", "contains:", "words:", "words:many", "words:-3", ""]
)
def test_a_reward_that_there_is_not(name):
    with pytest.raises(InputError, match="there is no reward .*; give story, contains:WORD"):
        named(name)


@pytest.mark.parametrize("words", ["dog,", "bad dog", ","])
def test_no_text_contains_what_is_not_one_word(words):
    with pytest.raises(InputError, match="is not one word, so no text contains it"):
        named(f"contains:{words}")


def test_the_story_must_go_on():
    with pytest.raises(InputError, match="nothing follows sentence 5 of 5; hide an earlier one"):
        named("story", hidden=5)
    assert named("words:3", hidden=5) == WordCount(3)


BAD = {
    "nan": (lambda gaps: torch.full((len(gaps),), math.nan), NonFiniteError, "is nan at point 0"),
    "+inf": (lambda gaps: torch.full((len(gaps),), math.inf), NonFiniteError, "is inf at point 0"),
    "one number": (lambda gaps: torch.tensor(1.0), InputError, r"returned \(\) for 2 points"),
    "a column": (lambda gaps: torch.zeros(len(gaps), 1), InputError, r"\(2, 1\) for 2 points"),
    "a list": (lambda gaps: [0.0 for _ in gaps], InputError, "returned list for 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reward_is_refused_before_anything_is_written(name, tmp_path):
    reward, error, words = BAD[name]
    frame = frame_for(CODEC, STORIES, ends=False)
    network = MaskedTransformer(
        CODEC.vocabulary, pad=CODEC.pad, width=16, depth=1, heads=2, generator=seeded()
    )
    prompts = Prompts.of(frame, story_gaps(STORIES, 2))
    with pytest.raises(error, match=words):
        fit_text_posterior(tmp_path / "out", TextPrior(frame, network, 4, {}), prompts, reward)
    assert not (tmp_path / "out").exists()
