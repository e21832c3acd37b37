"""Texts: what is read is what was written, what is dropped, what is refused; splits."""

import gzip
import json

import pytest

from rtb_rl.errors import InputError
from rtb_rl.tasks.language.texts import Texts, load_texts, sentences_of, split

FIVE = ["One ran.", "Two sat.", "Three ate.", "Four slept.", "Five left."]


def write(path, *records):
    lines = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in records)
    data = lines.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_records_of_every_kind(tmp_path, name):
    path = write(
        tmp_path / name,
        {"sentences": FIVE, "text": "not this"},
        {"sentences": None, "text": " ".join(FIVE)},
        {"text": "One  ran.\tTwo sat. Three ate.\nFour slept. Five left."},
        {"sentences": FIVE[:4], "endings": ["No.", "Five left."], "right": 1},
        {"sentences": FIVE[:4], "endings": ["Yes.", "No."], "right": 0},
        "",
        {"text": "Too short. By three."},
    )
    texts = load_texts(path)
    assert texts.name == name
    assert texts.stories == [tuple(FIVE)] * 4 + [(*FIVE[:4], "Yes.")]
    assert texts.dropped == 1
    assert len(texts) == 5


def test_two_observations_and_the_first_middle(tmp_path):
    record = {"obs1": "It rained.", "obs2": "She was dry.", "middles": ["A  roof.", "A hat."]}
    texts = load_texts(write(tmp_path / "a.jsonl", record), sentences=3)
    assert texts.stories == [("It rained.", "A roof.", "She was dry.")]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_plain_text_is_one_text_a_line(tmp_path, name):
    path = write(tmp_path / name, " ".join(FIVE), "", "  ", "Only one.", 'Is it? "It is!" He left.')
    texts = load_texts(path, sentences=None)
    assert texts.stories == [tuple(FIVE), ("Is it?", '"It is!"', "He left.")]
    assert texts.dropped == 1
    assert load_texts(path, sentences=1).stories == [("Only one.",)]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("He ran. She sat!", ("He ran.", "She sat!")),
        ("It cost 3.50 today. Cheap?", ("It cost 3.50 today.", "Cheap?")),
        ('"Go." He went.', ('"Go."', "He went.")),
        ("(Not now.) Then", ("(Not now.)", "Then")),
        ("Wait... what?! No", ("Wait...", "what?!", "No")),
        (
            "\u201cGo.\u201d He said \u2018no.\u2019 So",
            ("\u201cGo.\u201d", "He said \u2018no.\u2019", "So"),
        ),
        ("no end", ("no end",)),
        ("  ", ()),
    ],
)
def test_sentences_end_at_marks_and_their_quotes(text, sentences):
    assert sentences_of(text) == sentences


def test_a_separator_inside_a_json_string_does_not_end_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "A b.\u2028C d."}, ensure_ascii=False), encoding="utf-8")
    assert load_texts(path, sentences=2).stories == [("A b.", "C d.")]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("{not json", "JSONDecodeError"),
        ('["a list"]', "a list, not an object"),
        ({"words": 3}, "'text'"),
        ({"sentences": "A. B."}, "sentences are a str"),
        ({"sentences": ["A.", 3]}, "3 is no text"),
        ({"sentences": FIVE[:4], "endings": ["A.", "B."], "right": 2}, "2 of 2, counted from 0"),
        ({"sentences": FIVE[:4], "endings": ["A.", "B."], "right": -1}, "-1 of 2"),
        ({"sentences": FIVE[:4], "endings": ["A.", "B."]}, "'right'"),
        ({"obs1": "A.", "obs2": "B.", "middles": []}, "out of range"),
        ({"obs1": "A.", "obs2": "B.", "middles": "He ran."}, "middles are a str"),
    ],
)
def test_a_bad_record_is_named_by_its_line(tmp_path, record, says):
    path = write(tmp_path / "a.jsonl", {"sentences": FIVE}, "", record)
    with pytest.raises(InputError, match="line 3 of a.jsonl is no story") as error:
        load_texts(path)
    assert says in str(error.value)


def test_files_that_are_not_there_or_not_texts(tmp_path):
    with pytest.raises(InputError, match="no file of texts at .*a.jsonl"):
        load_texts(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="'a.csv' by its ending; give 'grammar'"):
        load_texts(write(tmp_path / "a.csv", "A. B."))
    with pytest.raises(InputError, match="'b.gz' by its ending"):
        load_texts(write(tmp_path / "b.gz", "A. B."))
    (tmp_path / "c.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="can't be read"):
        load_texts(tmp_path / "c.txt.gz")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="UTF-8"):
        load_texts(tmp_path / "d.txt")


def test_no_story_of_that_many_sentences(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "A b. C d."}, {"text": "A b. C d. E f."})
    with pytest.raises(InputError, match="exactly 5 sentences: its 2 texts have 2 to 3"):
        load_texts(path)
    with pytest.raises(InputError, match="two or more sentences: its 0 texts have 0 to 0"):
        load_texts(write(tmp_path / "b.txt", "", " "), sentences=None)


def test_the_grammar_is_always_the_same():
    texts = load_texts("grammar")
    assert (texts.name, len(texts), texts.dropped) == ("grammar", 6000, 0)
    # published numbers are of these stories: a change of the table is a change of numbers
    assert texts.sha256.startswith("ec121287b21152aa")


def test_the_digest_tells_stories_apart_by_their_sentences():
    assert Texts("a", [("A b.", "C.")]).sha256 == Texts("b", [("A b.", "C.")], dropped=3).sha256
    assert Texts("a", [("A b.", "C.")]).sha256 != Texts("a", [("A", "b. C.")]).sha256
    assert Texts("a", [("A.",), ("B.",)]).sha256 != Texts("a", [("A.", "B.")]).sha256


def numbered(n):
    return Texts("numbered", [(f"Number {i}.", "End.") for i in range(n)])


def test_parts_share_no_story_and_have_their_sizes():
    texts = numbered(100)
    doubled = Texts("doubled", texts.stories + texts.stories[:50])
    parts = split(doubled, {"train": 0.8, "valid": 0.1, "test": 0.1}, seed=3)
    distinct = {name: set(part) for name, part in parts.items()}
    assert {name: len(part) for name, part in distinct.items()} == {
        "train": 80,
        "valid": 10,
        "test": 10,
    }
    assert set.union(*distinct.values()) == set(texts.stories)  # 100, so they are disjoint
    joined = sorted(story for part in parts.values() for story in part)
    assert joined == sorted(doubled.stories)  # repeats stay, with their story


def test_a_split_is_shuffled_by_its_seed_and_not_by_the_order():
    texts = numbered(60)
    shares = {"a": 0.5, "b": 0.25}
    parts = split(texts, shares, seed=0)
    assert [len(part) for part in parts.values()] == [30, 15]  # a quarter is left out
    assert split(Texts("x", texts.stories[::-1]), shares, seed=0) == parts
    assert set(split(texts, shares, seed=1)["a"]) != set(parts["a"])
    assert set(parts["a"]) != set(texts.stories[:30])
    assert parts["a"] != sorted(parts["a"])


@pytest.mark.parametrize("shares", [{}, {"a": 0.9, "b": 0.2}, {"a": 1.0, "b": 0.0}, {"a": -0.5}])
def test_shares_that_are_no_split(shares):
    with pytest.raises(InputError, match="positive shares that sum to at most 1"):
        split(numbered(10), shares, seed=0)


def test_a_part_may_not_be_empty():
    with pytest.raises(InputError, match="leaves 'b' empty"):
        split(numbered(10), {"a": 0.9, "b": 0.01}, seed=0)
