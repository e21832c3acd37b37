"""Texts as token ids and back, by any tokenizer: one trained here, or one of a hub.

Beside those of texts there are an id to fill up with, one for what is masked, one that ends a text.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rtb_rl.adapters.extras import extra
from rtb_rl.errors import InputError
from rtb_rl.training.checkpoint import replace_file

with extra("language"):
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE, WordLevel
    from tokenizers.trainers import BpeTrainer, WordLevelTrainer

PAD, MASK, END, UNKNOWN = "[PAD]", "[MASK]", "[END]", "[UNK]"
FILE = "tokenizer.json"
SHOWN = 40  # characters of a text that an error shows

SINGLE_QUOTES = "\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}"
# Numbers, words with the apostrophes inside them, and each other sign alone.
WORD = r"\d+(?:[.,:]\d+)+|\w+(?:'\w+)*|[^\w\s]"


class TextCodec(Protocol):
    """Texts as ids 0..vocabulary-1 and back.

    `pad` fills up, `mask` stands for what is masked, `end` ends a text, `unknown` (None: there is
    none) replaces what has no id. `never`: the ids that must not be generated; `end` is not one.
    """

    vocabulary: int
    pad: int
    mask: int
    end: int
    unknown: int | None
    never: tuple[int, ...]

    @property
    def sha256(self) -> str: ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special ones: a text can't spell them.

        Give " " + text for a text that follows another: tokens of bytes hold the space before.
        """
        ...

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row without its special ids and outer spaces; none ends the text."""
        ...


class TokenizersCodec:
    """A codec over a `tokenizers.Tokenizer` with [PAD] as id 0, [MASK], [END] and, or not, [UNK].

    InputError for any other tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer):
        tokenizer.encode_special_tokens = True  # "[MASK]" in a text is five signs, not an id
        self.tokenizer = tokenizer
        pad, mask, end = (tokenizer.token_to_id(token) for token in (PAD, MASK, END))
        if pad != 0 or mask is None or end is None:
            raise InputError(
                f"the tokenizer has {PAD} as id {pad}, {MASK} as {mask}, {END} as {end}; it needs"
                " all, the first as 0: use train_word_codec or train_byte_codec"
            )
        self.vocabulary: int = tokenizer.get_vocab_size()
        self.pad: int = pad
        self.mask: int = mask
        self.end: int = end
        self.unknown: int | None = tokenizer.token_to_id(UNKNOWN)
        hidden = (pad, mask, self.unknown)
        self.never: tuple[int, ...] = tuple(one for one in hidden if one is not None)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [row.ids for row in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        found = self.tokenizer.decode_batch([list(row) for row in ids], skip_special_tokens=True)
        return [text.strip() for text in found]

    @property
    def json(self) -> str:
        """The whole tokenizer; equal for equal codecs."""
        return self.tokenizer.to_str()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` into a directory, made where it is missing."""
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / FILE, self.json.encode())

    @classmethod
    def load(cls, directory: Path) -> "TokenizersCodec":
        """The codec saved in a directory; InputError where there is none or it is damaged."""
        path = directory / FILE
        if not path.is_file():
            raise InputError(f"no {FILE} in {directory}; give a directory that a codec is saved in")
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises plain Exception
            raise InputError(f"{path} is no tokenizer ({error}); train and save it anew") from error
        return cls(tokenizer)


def train_word_codec(texts: Iterable[str], vocabulary: int = 2000) -> TokenizersCodec:
    """A codec of the most frequent words and signs of the texts, at most `vocabulary` ids in all.

    Lower-cased; rarer words become the unknown id. Opening and closing quotes are two signs, told
    apart by the space before them, and are straight when decoded.
    """
    special = [PAD, MASK, END, UNKNOWN]
    tokenizer = Tokenizer(WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(f"[{SINGLE_QUOTES}]"), "'"),
            normalizers.Replace(Regex("[“”]"), '"'),
            normalizers.Replace(Regex(r'(?<![^\s(])"'), "“"),
            normalizers.Replace('"', "”"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="\0", cleanup=False),  # a space before all but the first
            decoders.Fuse(),
            decoders.Replace(Regex(r" (?=[.,!?;:%)\]'”…-])|(?<=[(\[$£“-]) "), ""),
            decoders.Replace(Regex("[“”]"), '"'),
        ]
    )
    trainer = WordLevelTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    return _trained(tokenizer, trainer, texts, vocabulary, len(special) + 1)


def train_byte_codec(texts: Iterable[str], vocabulary: int = 2000) -> TokenizersCodec:
    """A codec of byte pairs (BPE on bytes), which knows every text; `vocabulary` ids at most."""
    special, signs = [PAD, MASK, END], pre_tokenizers.ByteLevel.alphabet()
    settings: dict[str, Any] = {"special_tokens": special, "initial_alphabet": signs}
    trainer = BpeTrainer(vocab_size=vocabulary, show_progress=False, **settings)
    return _trained(_of_bytes(BPE()), trainer, texts, vocabulary, len(special) + len(signs))


def _of_bytes(model: BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _trained(
    tokenizer: Tokenizer, trainer: Any, texts: Iterable[str], vocabulary: int, least: int
) -> TokenizersCodec:
    texts = list(texts)
    if not any(text.strip() for text in texts):
        raise InputError(f"{len(texts)} texts without a word can't train a codec; give others")
    if vocabulary < least:
        raise InputError(f"a vocabulary of {vocabulary} ids is too small; give {least} or more")
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return TokenizersCodec(tokenizer)


class HubCodec:
    """A codec over a tokenizer of transformers (`AutoTokenizer.from_pretrained`, or `gpt2_codec`).

    `mask`: the id that stands for what is masked, of the tokenizer or beyond its last; None: that
    of the tokenizer. The end is its end of sequence, or else its separator; it fills up with the
    end where it has nothing else. InputError for a tokenizer without mask or end.
    """

    def __init__(self, tokenizer: Any, *, mask: int | None = None):
        self.tokenizer = tokenizer
        end = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)
        mask = _first(mask, tokenizer.mask_token_id)
        if end is None or mask is None:
            raise InputError(
                f"the tokenizer has {end} as end, {mask} as mask; give `mask`, or one with both"
            )
        size = len(tokenizer)
        self.vocabulary: int = max(size, mask + 1)
        self.pad: int = _first(tokenizer.pad_token_id, end)  # type: ignore[assignment]
        self.mask: int = mask
        self.end: int = end
        # GPT-2 names its end as unknown but, made of bytes, has no use for it
        self.unknown: int | None = None if tokenizer.unk_token_id == end else tokenizer.unk_token_id
        self._special = {*tokenizer.all_special_ids, mask, *range(size, self.vocabulary)}
        self.never: tuple[int, ...] = tuple(sorted(self._special - {end}))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,  # no warning of texts longer than a model's window
        )["input_ids"]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        kept = [[one for one in map(int, row) if one not in self._special] for row in ids]
        # of no rows `batch_decode` would make one text
        return [text.strip() for text in self.tokenizer.batch_decode(kept)] if kept else []

    @property
    def sha256(self) -> str:
        content = f"{self.mask} {self.tokenizer.backend_tokenizer.to_str()}"
        return hashlib.sha256(content.encode()).hexdigest()


def gpt2_codec(vocab: Path, merges: Path, *, mask: int | None = None) -> HubCodec:
    """The codec of GPT-2's `vocab.json` and `merges.txt`; `mask`: None, the first id after them."""
    with extra("language"):
        from transformers import PreTrainedTokenizerFast
    try:
        tokenizer = _of_bytes(BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(
            f"{vocab} and {merges} are no GPT-2's vocab.json and merges.txt ({error}); give those"
        ) from error
    hub = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    return HubCodec(hub, mask=_first(mask, len(hub)))


def _first(*ids: int | None) -> int | None:
    """The first id that there is."""
    return next((one for one in ids if one is not None), None)


def check_texts(codec: TextCodec, texts: Sequence[str], *, window: int) -> float:
    """The share of unknown tokens in the texts, if each can be used: one to `window` tokens.

    InputError for a text that is empty, longer, or of unknown words only.
    """
    rows = codec.encode(texts)
    if not rows:
        raise InputError("there is no text; give at least one")
    for number, (text, row) in enumerate(zip(texts, rows), 1):
        what = f"text {number} of {len(rows)} ({text[:SHOWN]!r}{'...' * (len(text) > SHOWN)})"
        if not row or not text.strip():
            raise InputError(f"{what} is empty; leave it out")
        if len(row) > window:
            raise InputError(
                f"{what} has {len(row)} tokens, the window {window}; shorten it or widen the window"
            )
        known = [one for one in row if one != codec.unknown]
        if len(known) < len(row) and not any(map(str.isalnum, codec.decode([known])[0])):
            raise InputError(f"{what} has no known word; use other words or train a codec on them")
    return sum(one == codec.unknown for row in rows for one in row) / sum(map(len, rows))
