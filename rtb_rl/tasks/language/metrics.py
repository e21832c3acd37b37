"""How near texts are to reference texts, and how varied and how repetitive they are.

Words are those of `words`: lower-case, each punctuation mark one of its own.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rtb_rl.adapters.extras import extra
from rtb_rl.errors import InputError

WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")


class CorpusBleu(NamedTuple):
    """BLEU of a corpus, 0 to 100, and the signature that makes it comparable."""

    score: float
    signature: str


def words(text: str) -> list[str]:
    """Lower-case words, with the apostrophes inside them, and punctuation marks."""
    return WORD.findall(text.lower().replace("\u2019", "'"))


def bleu(candidates: Sequence[str], references: Sequence[str], *, order: int = 4) -> list[float]:
    """BLEU of each candidate, n-grams up to `order`, against its one reference: 0 to 1.

    An order without a match counts 0.1 matches (nltk's smoothing method 1), the setting of arXiv
    2405.20971 appendix F. So a candidate of fewer than `order` words scores below 1 even where it
    is the reference.
    """
    _check_pairs(candidates, references, order)
    with extra("language"):
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    smoothing, weights = SmoothingFunction().method1, (1 / order,) * order
    scores: list[Any] = [
        sentence_bleu([words(reference)], words(candidate), weights, smoothing_function=smoothing)
        for candidate, reference in zip(candidates, references)
    ]
    return [float(score) for score in scores]


def gleu(candidates: Sequence[str], references: Sequence[str], *, order: int = 4) -> list[float]:
    """GLEU of each candidate: the lesser of precision and recall of its n-grams of 1 to `order`.

    0 to 1, the same when the two change places; arXiv 1609.08144 section 5, by nltk.
    """
    _check_pairs(candidates, references, order)
    with extra("language"):
        from nltk.translate.gleu_score import sentence_gleu
    return [
        float(sentence_gleu([words(reference)], words(candidate), max_len=order))
        for candidate, reference in zip(candidates, references)
    ]


def corpus_bleu(candidates: Sequence[str], references: Sequence[str]) -> CorpusBleu:
    """BLEU-4 of all candidates together, one reference each, by sacrebleu's defaults.

    Its own tokens (13a) and case: give texts as they are. The score is in percent.
    """
    _check_pairs(candidates, references)
    with extra("language"):
        from sacrebleu.metrics.bleu import BLEU
    metric = BLEU()
    score = metric.corpus_score(list(candidates), [list(references)]).score
    return CorpusBleu(score, str(metric.get_signature()))


def distinct(texts: Sequence[str], *, order: int = 2) -> float:
    """The share of distinct n-grams among all n-grams of the texts: near 0 repetitive, 1 varied.

    distinct-n of arXiv 1510.03055; it falls with the number of texts: compare equal numbers.
    """
    grams = [gram for text in texts for gram in _grams(words(text), order)]
    if not grams:
        raise InputError(
            f"none of {len(texts)} texts has {order} words; give longer texts or a lower `order`"
        )
    return len(set(grams)) / len(grams)


def repetition(candidates: Sequence[str], contexts: Sequence[str], *, order: int = 3) -> float:
    """The mean share of a candidate's n-grams that its context holds as well: 0 to 1.

    A candidate of fewer than `order` words repeats nothing: 0.
    """
    _check_pairs(candidates, contexts, order)
    shares = []
    for candidate, context in zip(candidates, contexts):
        held = set(_grams(words(context), order))
        grams = _grams(words(candidate), order)
        shares.append(sum(gram in held for gram in grams) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)


def bert_score(
    candidates: Sequence[str],
    references: Sequence[str],
    *,
    model: str = "microsoft/deberta-xlarge-mnli",
) -> list[float]:
    """BERTScore F1 of each candidate (arXiv 1904.09675), rescaled with its baseline: at most 1.

    The model of arXiv 2405.20971. Needs the package bert-score, which is no dependency of this
    package, and the model's weights, from the network or a local cache; InputError where either or
    the model's baseline is missing.
    """
    _check_pairs(candidates, references)
    try:
        import bert_score as package  # pyright: ignore
    except ImportError as error:
        raise InputError(
            f"BERTScore needs the package bert-score ({error}): pip install bert-score, or leave"
            " this metric out"
        ) from None
    # where it has no baseline, the package prints a warning and returns scores of another scale
    baseline = Path(str(package.__file__)).parent / "rescale_baseline" / "en" / f"{model}.tsv"
    if not baseline.is_file():
        raise InputError(f"bert-score has no baseline of {model!r}; give a `model` that has one")
    try:
        _, _, f1 = package.score(
            list(candidates),
            list(references),
            model_type=model,
            lang="en",
            rescale_with_baseline=True,
        )
    except OSError as error:
        raise InputError(
            f"BERTScore's model {model!r} can't be loaded ({error}); it comes from the network:"
            " connect once, or leave this metric out"
        ) from error
    return f1.tolist()


def _grams(tokens: list[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]


def _check_pairs(first: Sequence[str], second: Sequence[str], order: int = 1) -> None:
    if len(first) != len(second) or not first:
        raise InputError(
            f"{len(first)} candidates don't go with {len(second)} other texts; give one for each,"
            " and at least one"
        )
    if order < 1:
        raise InputError(f"there are no n-grams of {order} words; give an `order` of 1 or more")
