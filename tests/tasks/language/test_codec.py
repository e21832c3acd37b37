"""Texts to ids and back: round trips, special ids, files, foreign tokenizers, what is refused."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel, WordPiece
from transformers import PreTrainedTokenizerFast

from rtb_rl.errors import InputError
from rtb_rl.tasks.language.codec import (
    HubCodec,
    TextCodec,
    TokenizersCodec,
    check_texts,
    gpt2_codec,
    train_byte_codec,
    train_word_codec,
)
from rtb_rl.tasks.language.texts import load_texts

STORIES = [
    "The dog ran. It wasn't hungry!",
    'She said: "Go home," and (slowly) they went.',
    "The well-known cat paid $1,250.50 at 5:30; the dogs' bowl was empty...",
]


@pytest.fixture(scope="module")
def words():
    return train_word_codec(STORIES)


@pytest.fixture(scope="module")
def pairs():
    return train_byte_codec(STORIES, 300)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    trained = train_byte_codec([*STORIES, "<|endoftext|>"], 300).tokenizer
    trained.model.save(str(folder))
    # GPT-2's end is the last entry of its vocabulary, and no result of a merge
    text = (folder / "vocab.json").read_text()
    size = trained.get_vocab_size()
    (folder / "vocab.json").write_text(text[:-1] + f',"<|endoftext|>":{size}' + "}")
    return gpt2_codec(folder / "vocab.json", folder / "merges.txt")


@pytest.fixture(scope="module")
def bert():
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "dog",
        "ran",
        "##ning",
        ".",
        "walk",
    ]
    tokenizer = Tokenizer(
        WordPiece({piece: row for row, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def test_special_ids_of_trained_codecs(words, pairs):
    assert (words.pad, words.mask, words.end, words.unknown) == (0, 1, 2, 3)
    assert words.never == (0, 1, 3)
    assert (pairs.pad, pairs.mask, pairs.end, pairs.unknown) == (0, 1, 2, None)
    assert pairs.never == (0, 1)
    for codec in (words, pairs):
        assert codec.vocabulary == codec.tokenizer.get_vocab_size()
        rows = codec.encode(STORIES)
        assert {codec.pad, codec.mask, codec.end}.isdisjoint(one for row in rows for one in row)
        assert max(one for row in rows for one in row) < codec.vocabulary


def test_words_come_back_lower_case_and_well_spaced(words):
    rows = words.encode(STORIES)
    assert words.decode(rows) == [text.lower() for text in STORIES]
    assert words.encode(words.decode(rows)) == rows
    assert [len(row) for row in rows] == [8, 15, 20]  # wasn't, 1,250.50 and 5:30 are one id


def test_curly_quotes_and_case_make_no_difference_to_words(words):
    curly = "SHE said: \u201cGo home,\u201d and (slowly) they went. It wasn\u2019t"
    straight = 'she said: "go home," and (slowly) they went. it wasn\'t'
    assert words.encode([curly]) == words.encode([straight])
    assert words.unknown not in words.encode([curly])[0]


def test_opening_and_closing_quotes_are_two_signs(words):
    ((opening, _, _, _, closing),) = words.encode(['"go home,"'])
    assert opening != closing
    assert words.decode([[opening, *words.encode(["dog"])[0], closing]]) == ['"dog"']


def test_rare_words_are_unknown():
    codec = train_word_codec(["a a a b b c"], 6)
    assert codec.vocabulary == 6
    assert codec.encode(["a b c d"]) == [[4, 5, codec.unknown, codec.unknown]]
    assert codec.decode([[4, codec.unknown, 5]]) == ["a b"]


def test_pairs_of_bytes_know_every_text(pairs):
    texts = [*STORIES, "na\u00efve \u732b \N{CAT FACE}"]
    assert pairs.decode(pairs.encode(texts)) == texts
    assert pairs.encode([" dog"]) != pairs.encode(["dog"])
    joined = pairs.encode(["The dog"])[0] + pairs.encode([" ran."])[0]
    assert pairs.decode([joined]) == ["The dog ran."]
    assert pairs.vocabulary == 300
    assert len(pairs.encode(STORIES)[0]) < len(STORIES[0])


def test_special_ids_are_dropped_and_end_nothing(words, pairs, gpt2, bert):
    for codec in (words, pairs, gpt2, HubCodec(bert)):
        dog, ran = codec.encode(["the dog", " ran."])
        special = [codec.pad, codec.mask, codec.end, *codec.never]
        assert codec.decode([special + dog + special + ran + special, [codec.end]]) == [
            "the dog ran.",
            "",
        ]


def test_a_text_cannot_spell_a_special_id(words, pairs, gpt2, bert):
    for codec in (words, pairs, gpt2, HubCodec(bert)):
        (row,) = codec.encode(["[PAD] [MASK] [END] [CLS] [SEP] <|endoftext|>"])
        assert row
        assert set(row).isdisjoint({codec.pad, codec.mask, codec.end})


def test_nothing_gives_nothing(words, pairs, gpt2, bert):
    for codec in (words, pairs, gpt2, HubCodec(bert)):
        assert codec.encode([]) == []
        assert codec.encode([""]) == [[]]
        assert codec.decode([]) == []
        assert codec.decode([[]]) == [""]


@pytest.mark.parametrize("train", [train_word_codec, train_byte_codec])
def test_a_saved_codec_is_the_same(tmp_path, train):
    codec = train(STORIES, 300)
    codec.save(tmp_path / "new" / "codec")
    loaded = TokenizersCodec.load(tmp_path / "new" / "codec")
    assert [file.name for file in (tmp_path / "new" / "codec").iterdir()] == ["tokenizer.json"]
    texts = [*STORIES, "[MASK] new words"]
    assert loaded.encode(texts) == codec.encode(texts)
    assert loaded.never == codec.never
    assert loaded.sha256 == codec.sha256
    assert train(STORIES[:2], 300).sha256 != codec.sha256


@pytest.mark.parametrize("train", ["train_word_codec", "train_byte_codec"])
def test_training_is_the_same_in_every_process(train):
    # hash tables of another process have other orders, and ties must not be broken by them
    code = (
        f"from rtb_rl.tasks.language.codec import {train} as train\n"
        "from rtb_rl.tasks.language.texts import load_texts\n"
        "texts = [' '.join(story) for story in load_texts('grammar').stories[:300]]\n"
        "print(train(texts, 400).sha256)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True) for _ in range(2)]
    assert runs[0].returncode == 0, runs[0].stderr
    assert len(runs[0].stdout.strip()) == 64
    assert runs[0].stdout == runs[1].stdout


def test_the_grammar_fits_a_small_vocabulary():
    texts = [" ".join(story) for story in load_texts("grammar").stories]
    codec = train_word_codec(texts)
    assert codec.vocabulary < 350
    assert check_texts(codec, texts, window=50) == 0
    assert codec.decode(codec.encode(texts)) == [text.lower() for text in texts]


def test_codecs_that_can_not_be(tmp_path):
    with pytest.raises(InputError, match="2 texts without a word"):
        train_word_codec(["", " "])
    with pytest.raises(InputError, match="a vocabulary of 4 ids is too small; give 5 or more"):
        train_word_codec(["a"], 4)
    with pytest.raises(InputError, match="a vocabulary of 258 ids is too small; give 259 or more"):
        train_byte_codec(["a"], 258)
    with pytest.raises(InputError, match=r"no tokenizer.json in .*; give a directory"):
        TokenizersCodec.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="is no tokenizer"):
        TokenizersCodec.load(tmp_path)
    with pytest.raises(InputError, match=r"\[PAD\] as id 1, \[MASK\] as 0, \[END\] as None"):
        TokenizersCodec(Tokenizer(WordLevel({"[MASK]": 0, "[PAD]": 1}, unk_token="[PAD]")))


def test_gpt2_gets_a_mask_beyond_its_vocabulary(gpt2):
    assert gpt2.end == gpt2.pad == 300
    assert gpt2.mask == 301
    assert gpt2.vocabulary == 302
    assert gpt2.unknown is None
    assert gpt2.never == (301,)  # it fills up with its end, which may be generated
    assert gpt2.decode(gpt2.encode([*STORIES, "new \u732b"])) == [*STORIES, "new \u732b"]
    assert gpt2.encode([" dog"]) != gpt2.encode(["dog"])


def test_a_mask_further_out_leaves_ids_that_are_never_generated(gpt2):
    codec = HubCodec(gpt2.tokenizer, mask=304)
    assert codec.vocabulary == 305
    assert codec.never == (301, 302, 303, 304)
    assert codec.decode([[303, *codec.encode(["dog"])[0], 304]]) == ["dog"]
    assert codec.sha256 != gpt2.sha256


def test_files_that_are_no_gpt2(tmp_path):
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(InputError, match="no GPT-2's vocab.json and merges.txt"):
        gpt2_codec(tmp_path / "vocab.json", tmp_path / "merges.txt")


def test_a_tokenizer_of_bert(bert):
    codec = HubCodec(bert)
    assert (codec.pad, codec.unknown, codec.end, codec.mask) == (0, 1, 3, 4)
    assert codec.never == (0, 1, 2, 4)
    assert codec.vocabulary == 11
    assert codec.encode(["The dog walkning."]) == [[5, 6, 10, 8, 9]]
    assert codec.decode([[2, 5, 6, 10, 8, 9, 3]]) == ["the dog walkning."]
    assert check_texts(codec, ["the dog sat."], window=4) == 0.25


def test_a_tokenizer_without_mask_or_end(gpt2):
    with pytest.raises(InputError, match="300 as end, None as mask; give `mask`"):
        HubCodec(gpt2.tokenizer)
    bare = SimpleNamespace(eos_token_id=None, sep_token_id=None, mask_token_id=None)
    with pytest.raises(InputError, match="None as end, 5 as mask"):
        HubCodec(bare, mask=5)


def test_the_share_of_unknown_tokens(words, pairs):
    assert check_texts(words, ["the dog ran.", "the zebra ran."], window=4) == pytest.approx(1 / 8)
    assert check_texts(pairs, ["the zebra"], window=20) == 0


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([], "there is no text"),
        (["the dog", "  "], r"text 2 of 2 \('  '\) is empty"),
        (
            ["the dog ran.", "the dog ran. it"],
            r"text 2 of 2 \('the dog ran. it'\) has 5 tokens, the window 4",
        ),
        (["zebras sing."], r"text 1 of 1 \('zebras sing.'\) has no known word"),
        (["zebra " * 20], r"'zebra zebra zebra zebra zebra zebra zebr'\.\.\.\) has 20 tokens"),
    ],
)
def test_texts_that_can_not_be_used(words, pairs, texts, says):
    with pytest.raises(InputError, match=says):
        check_texts(words, texts, window=4)


def test_blank_text_is_empty_though_it_has_bytes(pairs):
    with pytest.raises(InputError, match="is empty"):
        check_texts(pairs, ["  "], window=9)


def test_both_kinds_are_codecs(words, gpt2):
    codecs: list[TextCodec] = [words, gpt2]  # for the type checker too
    for codec in codecs:
        for name in TextCodec.__annotations__:
            assert hasattr(codec, name)
