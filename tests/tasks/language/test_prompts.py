"""Texts with a gap as points and conditions, and back: every token in its place."""

import pytest
import torch
from torch import Generator, Tensor

from rtb_rl.errors import InputError
from rtb_rl.tasks.language.codec import train_byte_codec, train_word_codec
from rtb_rl.tasks.language.prompts import Frame, Gap, Prompts, story_gaps
from rtb_rl.tasks.language.texts import load_texts

TEXT = "a b c d e f g h"
WORDS = train_word_codec([TEXT])
PAD, MASK, END, UNKNOWN = 0, 1, 2, 3
FRAME = Frame(WORDS, slots=3, window=9)
ENDED = Frame(WORDS, slots=4, window=11, ends=True)
GAPS = [Gap("a b", "e f g", "c d"), Gap("h", "", "a b c"), Gap("a b c d", "f g", "e")]


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def ids(text: str) -> list[int]:
    """Of words, and of the special ones by their signs."""
    signs = {".": PAD, "_": MASK, "|": END, "?": UNKNOWN}
    return [signs[w] if w in signs else WORDS.encode([w])[0][0] for w in text.split()]


def test_left_gap_right_and_padding_are_in_their_places():
    condition = Prompts.of(FRAME, GAPS).condition
    assert condition["tokens"].tolist() == [
        ids("a b _ _ e f g . ."),
        ids("h _ _ _ . . . . ."),
        ids("a b c d _ f g . ."),
    ]
    assert condition["free"].tolist() == [[2, 3, -1], [1, 2, 3], [4, -1, -1]]
    assert condition["right"].int().tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 0, 0],
        [0] * 9,
        [0, 0, 0, 0, 0, 1, 1, 0, 0],
    ]
    assert condition["row"].tolist() == [0, 1, 2]
    assert condition["tokens"].dtype == condition["free"].dtype == torch.int64


def test_points_hold_what_was_there_and_token_0_in_unused_slots():
    prompts = Prompts.of(FRAME, GAPS)
    assert prompts.x0 is not None
    assert prompts.x0.tolist() == [ids("c d ."), ids("a b c"), ids("e . .")]


def test_texts_become_points_and_texts_again():
    for frame in (FRAME, ENDED):
        prompts = Prompts.of(frame, GAPS)
        assert prompts.x0 is not None
        assert frame.texts(prompts.x0, prompts.condition) == [gap.middle for gap in GAPS]
        assert prompts.written(prompts.x0, prompts.condition) == GAPS


def test_what_stands_in_unused_slots_is_no_text():
    prompts = Prompts.of(FRAME, GAPS)
    x0 = torch.tensor([ids("a b h"), ids("c d e"), ids("f g h")])
    assert FRAME.texts(x0, prompts.condition) == ["a b", "c d e", "f"]


def test_a_row_of_a_condition_knows_its_gap():
    prompts = Prompts.of(FRAME, GAPS)
    condition = {name: tensor[[2, 0, 2]] for name, tensor in prompts.condition.items()}
    x0 = torch.tensor([ids("a . ."), ids("b c ."), ids("d . .")])
    assert prompts.written(x0, condition) == [
        Gap("a b c d", "f g", "a"),
        Gap("a b", "e f g", "b c"),
        Gap("a b c d", "f g", "d"),
    ]


def test_a_gap_that_ends_itself_has_always_all_its_slots():
    prompts = Prompts.of(ENDED, GAPS)
    assert prompts.condition["free"].tolist() == [[2, 3, 4, 5], [1, 2, 3, 4], [4, 5, 6, 7]]
    assert prompts.condition["tokens"][0].tolist() == ids("a b _ _ _ _ e f g . .")
    assert prompts.x0 is not None
    assert prompts.x0.tolist() == [ids("c d | |"), ids("a b c |"), ids("e | | |")]


def test_the_first_end_ends_a_text():
    prompts = Prompts.of(ENDED, GAPS)
    x0 = torch.tensor([ids("a | b c"), ids("| a b c"), ids("a b c d")])
    assert ENDED.texts(x0, prompts.condition) == ["a", "", "a b c d"]


def test_what_is_never_drawn():
    """Without an end token in gaps, that one neither."""
    assert set(FRAME.never) == {PAD, MASK, UNKNOWN, END}
    assert set(ENDED.never) == {PAD, MASK, UNKNOWN}


def test_a_length_can_be_given_where_the_text_is_not_known():
    gaps = [Gap("a b", "c"), Gap("d", "e")]
    prompts = Prompts.of(FRAME, gaps, [3, 1])
    assert prompts.condition["free"].tolist() == [[2, 3, 4], [1, -1, -1]]
    assert prompts.x0 is None
    ended = Prompts.of(ENDED, gaps)
    assert (ended.condition["free"] >= 0).all() and ended.x0 is None


def test_a_given_length_goes_before_that_of_what_was_there():
    prompts = Prompts.of(FRAME, GAPS[:1], [3])
    assert prompts.condition["free"].tolist() == [[2, 3, 4]] and prompts.x0 is None


@pytest.mark.parametrize("sign", ["tokens", "free"])
def test_a_gap_may_fill_the_window_to_the_last_token(sign):
    prompts = Prompts.of(FRAME, [Gap("a b c", "d e f", "g h a")])
    assert bool((prompts.condition[sign] != {"tokens": PAD, "free": -1}[sign]).all())


BAD = {
    "no left context": (FRAME, Gap("", "b", "a"), None, "no text before the gap; give a left"),
    "blank left context": (FRAME, Gap("  ", "b", "a"), None, "no text before the gap"),
    "gap too long": (FRAME, Gap("a", "b", "a b c d"), None, "4 tokens and a gap 1 to 3"),
    "no room for an end": (ENDED, Gap("a", "b", "a b c d"), None, "'a b c d' has 4 tokens and a"),
    "empty gap": (FRAME, Gap("a", "b", ""), None, "'' has 0 tokens"),
    "text too long": (FRAME, Gap("a b c d", "e f g h", "a b"), None, "10 tokens.*window of 9"),
    "length missing": (FRAME, Gap("a", "b"), None, "must be told, in tokens; give a length"),
    "length too long": (FRAME, Gap("a", "b"), [4], "a gap of 4 tokens .* have 1 to 3"),
    "length zero": (FRAME, Gap("a", "b"), [0], "a gap of 0 tokens .* have 1 to 3"),
    "ends too long": (ENDED, Gap("a b c d", "e f g h", "a"), None, "12 tokens.*window of 11"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_error(name):
    frame, gap, lengths, words = BAD[name]
    with pytest.raises(InputError, match=words):
        Prompts.of(frame, [gap], lengths)


def test_one_bad_gap_among_good_ones_is_named():
    with pytest.raises(InputError, match="'e f g h a b c d' has 8 tokens"):
        Prompts.of(FRAME, [*GAPS, Gap("a", "b", "e f g h a b c d")])


def test_draws_are_uniform_over_the_gaps_with_all_that_belongs_to_them():
    prompts = Prompts.of(FRAME, GAPS)
    n = 3000
    condition, x0 = prompts.draw(n, generator=seeded())
    assert x0 is None
    counts = condition["row"].bincount(minlength=3)
    assert bool(((counts - n / 3).abs() < 4 * (n * 2 / 9) ** 0.5).all())
    for name, tensor in condition.items():
        assert torch.equal(tensor, prompts.condition[name][condition["row"]])


def test_examples_are_what_was_there_in_its_gap():
    prompts = Prompts.of(FRAME, GAPS)
    x0, condition = prompts.examples(50, generator=seeded())
    assert prompts.x0 is not None
    assert torch.equal(x0, prompts.x0[condition["row"]])
    for name, tensor in condition.items():
        assert torch.equal(tensor, prompts.condition[name][condition["row"]])
    assert set(condition["row"].tolist()) == {0, 1, 2}


def tokens_seen(x0: Tensor, condition: dict[str, Tensor]) -> list[int]:
    """The sequence with the point in its place."""
    row = condition["tokens"][0].tolist()
    for token, place in zip(x0[0].tolist(), condition["free"][0].tolist(), strict=True):
        if place >= 0:
            row[place] = token
    return row


def test_unknown_words_are_context_and_nothing_to_learn():
    prompts = Prompts.of(FRAME, [Gap("a", "b", "c zebra d")])
    x0, condition = prompts.examples(1, generator=seeded())
    assert condition["free"].tolist() == [[1, -1, 3]]
    assert condition["tokens"][0].tolist() == ids("a _ ? _ b . . . .")
    assert x0.tolist() == [ids("c . d")]
    assert tokens_seen(x0, condition) == ids("a c ? d b . . . .")
    ended = Prompts.of(ENDED, [Gap("a", "b", "c zebra")])
    x0, condition = ended.examples(1, generator=seeded())
    assert condition["free"].tolist() == [[1, -1, 3, 4]] and x0.tolist() == [ids("c . | |")]


def test_examples_need_known_middles():
    prompts = Prompts.of(FRAME, [Gap("a", "b"), GAPS[0]], [1, 2])
    with pytest.raises(InputError, match="no known middles to learn from"):
        prompts.examples(1, generator=seeded())


def test_gaps_of_stories():
    story = ("One.", "Two.", "Three.")
    assert story_gaps([story], 1) == [Gap("One.", "Three.", "Two.")]
    assert story_gaps([story], 2) == [Gap("One. Two.", "", "Three.")]


@pytest.mark.parametrize("ends", [False, True])
def test_byte_pairs_come_back_with_their_spaces(ends):
    """And the whole sequence is the text as it was written."""
    stories = load_texts("grammar").stories[:40]
    codec = train_byte_codec([" ".join(story) for story in stories], 400)
    longest = max(len(row) for row in codec.encode([" ".join(story) for story in stories]))
    slots = 40
    prompts = Prompts.of(Frame(codec, slots, longest + slots, ends), story_gaps(stories, 2))
    assert prompts.x0 is not None
    assert prompts.frame.texts(prompts.x0, prompts.condition) == [story[2] for story in stories]
    whole = prompts.condition["tokens"].tolist()
    for i, places in enumerate(prompts.condition["free"].tolist()):
        for token, place in zip(prompts.x0[i].tolist(), places, strict=True):
            if place >= 0:
                whole[i][place] = token
    assert codec.decode(whole) == [" ".join(story) for story in stories]
