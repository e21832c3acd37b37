"""Scores of texts against values worked out by hand."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from rtb_rl.errors import InputError
from rtb_rl.tasks.language.metrics import (
    bert_score,
    bleu,
    corpus_bleu,
    distinct,
    gleu,
    repetition,
    words,
)

nltk = pytest.importorskip("nltk")

CANDIDATE = "The dog ran away today."
REFERENCE = "the dog ran off today."
# words:  candidate  the dog ran away today .      reference  the dog ran off today .
# shared: 1-grams the dog ran today . (5 of 6), 2-grams the-dog dog-ran today-. (3 of 5),
#         3-grams the-dog-ran (1 of 4), 4-grams none (0 of 3)


def test_words_are_lower_case_and_marks_stand_alone():
    assert words("Don\u2019t stop, Anna's co-op!") == [
        *("don't", "stop", ",", "anna's", "co", "-", "op", "!")
    ]


def test_bleu_worked_by_hand():
    by_hand = math.exp(
        (math.log(5 / 6) + math.log(3 / 5) + math.log(1 / 4) + math.log(0.1 / 3)) / 4
    )
    assert bleu([CANDIDATE], [REFERENCE]) == pytest.approx([by_hand])
    two = math.sqrt(5 / 6 * 3 / 5)
    assert bleu([CANDIDATE], [REFERENCE], order=2) == pytest.approx([two])


def test_bleu_of_a_short_candidate_has_the_brevity_penalty():
    # all of its 4 words, 3 pairs, 2 triples and 1 quadruple are in the reference of 6 words
    assert bleu(["the dog ran off"], [REFERENCE]) == pytest.approx([math.exp(1 - 6 / 4)])


def test_bleu_of_the_reference_and_of_something_else():
    scores = bleu([REFERENCE, "a cat", "no."], [REFERENCE, "the dog .", "no."])
    assert scores[0] == pytest.approx(1)
    assert scores[1] == 0
    assert scores[2] == pytest.approx(0.1**0.5)  # two words: two orders are smoothed


def test_gleu_worked_by_hand():
    # 5 + 3 + 1 + 0 shared of 6 + 5 + 4 + 3 n-grams on both sides
    assert gleu([CANDIDATE], [REFERENCE]) == pytest.approx([9 / 18])
    assert gleu([CANDIDATE], [REFERENCE], order=2) == pytest.approx([8 / 11])
    # 4 + 3 + 2 + 1 n-grams, all of them among the 18 of the reference, either way round
    assert gleu(["the dog ran off"], [REFERENCE]) == pytest.approx([10 / 18])
    assert gleu([REFERENCE], ["the dog ran off"]) == pytest.approx([10 / 18])
    assert gleu([REFERENCE, "a cat"], [REFERENCE, "the dog"]) == [1, 0]


def test_corpus_bleu_sums_the_counts_of_all_pairs():
    pytest.importorskip("sacrebleu")
    candidates, references = (
        [CANDIDATE, "A cat sat on it ."],
        ["The dog ran off today.", "A cat sat on it ."],
    )
    # case is kept; the second pair adds 6, 5, 4, 3 matches of as many
    shares = [(5 + 6) / 12, (3 + 5) / 10, (1 + 4) / 8, (0 + 3) / 6]
    score, signature = corpus_bleu(candidates, references)
    assert score == pytest.approx(100 * math.prod(shares) ** 0.25)
    assert "tok:13a" in signature
    assert "smooth:exp" in signature
    assert corpus_bleu(["the cat sat on it ."], ["The Cat Sat On It ."]).score < 60


def test_distinct_by_hand():
    # pairs: a-b b-a a-b of the first, a-b b-c of the second: 3 kinds of 5
    texts = ["a b a b", "A b c"]
    assert distinct(texts) == pytest.approx(3 / 5)
    assert distinct(texts, order=1) == pytest.approx(3 / 7)
    with pytest.raises(InputError, match="none of 2 texts has 5 words"):
        distinct(texts, order=5)


def test_repetition_by_hand():
    context = "The dog ran off. It was late."
    # the-dog-ran, dog-ran-. : one of two; then no trigram at all; then none of one
    assert repetition(["the dog ran."], [context]) == pytest.approx(1 / 2)
    candidates = ["the dog ran.", "the dog", "a cat sat"]
    assert repetition(candidates, [context] * 3) == pytest.approx(1 / 6)
    # each has its own context
    assert repetition(["a b c", "d e f"], ["d e f", "a b c"]) == 0
    assert repetition(["the late dog ran"], [context], order=1) == 1


@pytest.mark.parametrize("score", [bleu, gleu, corpus_bleu, repetition, bert_score])
def test_pairs_must_fit(score):
    with pytest.raises(InputError, match="2 candidates don't go with 1 other texts"):
        score(["a", "b"], ["a"])
    with pytest.raises(InputError, match="at least one"):
        score([], [])


def test_no_order_of_zero():
    with pytest.raises(InputError, match="n-grams of 0 words"):
        bleu(["a"], ["a"], order=0)


@pytest.mark.parametrize(
    ("score", "package"), [(bleu, "nltk"), (gleu, "nltk"), (corpus_bleu, "sacrebleu")]
)
def test_a_missing_package_is_named(monkeypatch, score, package):
    for name in [one for one in sys.modules if one.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package}.*pip install 'rtb-rl\[language\]'"):
        score(["a"], ["a"])


def test_bert_score_names_what_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(InputError, match="pip install bert-score"):
        bert_score(["a"], ["a"])

    def score(candidates, references, **settings):
        assert settings["rescale_with_baseline"]
        if settings["model_type"] == "unreachable":
            raise OSError("no network")
        return None, None, torch.tensor([0.5, -0.25])

    (tmp_path / "rescale_baseline" / "en").mkdir(parents=True)
    for name in ("unreachable", "known"):
        (tmp_path / "rescale_baseline" / "en" / f"{name}.tsv").touch()
    package = SimpleNamespace(score=score, __file__=str(tmp_path / "__init__.py"))
    monkeypatch.setitem(sys.modules, "bert_score", package)
    assert bert_score(["a", "b"], ["a", "c"], model="known") == [0.5, -0.25]
    with pytest.raises(InputError, match=r"'unreachable' can't be loaded \(no network\)"):
        bert_score(["a"], ["a"], model="unreachable")
    with pytest.raises(InputError, match="no baseline of 'other'"):
        bert_score(["a"], ["a"], model="other")
