"""Sets of stories, each a tuple of sentences: where they come from, and how they are split."""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rtb_rl.errors import InputError
from rtb_rl.tasks.language.grammar import grammar_stories

Story = tuple[str, ...]
"""The sentences of one text, in order."""

GRAMMAR_STORIES, GRAMMAR_SEED = 6000, 20240531
FORMS = "'grammar', or a .txt or .jsonl file, plain or .gz"
RECORDS = (
    '{"sentences": [...]}, {"text": "..."}, {"sentences": [...], "endings": [...], "right": 0} or'
    ' {"obs1": "...", "middles": [...], "obs2": "..."}'
)
# A sentence ends after . ! or ? and the quotes or brackets that it closes, where a space follows.
BETWEEN_SENTENCES = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["'”\u2019)])) """)


@dataclass(frozen=True)
class Texts:
    """Stories, the digest of all their sentences, and how many others were `dropped`."""

    name: str
    stories: list[Story]
    sha256: str = ""
    dropped: int = 0

    def __post_init__(self):
        if not self.sha256:
            content = json.dumps(self.stories).encode()
            object.__setattr__(self, "sha256", hashlib.sha256(content).hexdigest())

    def __len__(self) -> int:
        return len(self.stories)


def load_texts(source: str | Path, *, sentences: int | None = 5) -> Texts:
    """The stories that `source` names, those of exactly `sentences` sentences (None: two or more).

    "grammar": 6,000 stories of `grammar_stories`, always the same. A .txt file: one text a line,
    blank lines ignored. A .jsonl file: one record a line, of "sentences" (or null and a "text"),
    with "endings" and the number of the "right" one (Story Cloze), or of "obs1", "middles", "obs2"
    (alphaNLG, of which the first middle is taken). Both plain or gzipped; white space is
    normalised. InputError where there is no such file, no story, or a line that is no record.
    """
    if str(source) == "grammar":
        generator = torch.Generator().manual_seed(GRAMMAR_SEED)
        name, stories = "grammar", grammar_stories(GRAMMAR_STORIES, generator=generator)
    else:
        path = Path(source).expanduser()
        name, stories = path.name, _read(path)
    kept = [story for story in stories if _has(story, sentences)]
    if not kept:
        raise InputError(_nothing_usable(name, stories, sentences))
    return Texts(name, kept, dropped=len(stories) - len(kept))


def split(texts: Texts, shares: Mapping[str, float], *, seed: int) -> dict[str, list[Story]]:
    """Shuffled parts of the texts, without a common story: `shares` of the distinct stories.

    The same for the same seed whatever the order of the texts; a story that occurs twice is twice
    in its part. InputError for shares that don't fit or a part that would be empty.
    """
    if not shares or min(shares.values()) <= 0 or sum(shares.values()) > 1 + 1e-9:
        raise InputError(
            f"shares {dict(shares)} are no split; give positive shares that sum to at most 1"
        )
    repeats: dict[Story, int] = {}
    for story in texts.stories:
        repeats[story] = repeats.get(story, 0) + 1
    distinct = sorted(repeats)
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    parts: dict[str, list[Story]] = {}
    total, begin = 0.0, 0
    for name, share in shares.items():
        total += share
        end = min(round(total * len(distinct)), len(distinct))
        chosen = [distinct[row] for row in order[begin:end]]
        parts[name] = [story for story in chosen for _ in range(repeats[story])]
        if not chosen:
            raise InputError(
                f"a share of {share} of the {len(distinct)} distinct stories of {texts.name} leaves"
                f" {name!r} empty; give more stories or a larger share"
            )
        begin = end
    return parts


def sentences_of(text: str) -> Story:
    """A text cut after . ! or ? (and closing quotes) where a space follows; no abbreviations."""
    return tuple(part for part in BETWEEN_SENTENCES.split(_normalised(text)) if part)


def _normalised(text: str) -> str:
    return " ".join(text.split())


def _has(story: Story, sentences: int | None) -> bool:
    return len(story) >= 2 if sentences is None else len(story) == sentences


def _nothing_usable(name: str, stories: list[Story], sentences: int | None) -> str:
    wanted = "two or more" if sentences is None else f"exactly {sentences}"
    lengths = sorted({len(story) for story in stories}) or [0]
    found = f"its {len(stories)} texts have {lengths[0]} to {lengths[-1]}"
    return (
        f"{name} has no story of {wanted} sentences: {found}; change `sentences`, or give another"
        " file"
    )


def _read(path: Path) -> list[Story]:
    """All stories of a file, of whatever length."""
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in {".txt", ".jsonl"}:
        raise InputError(f"texts can't be read from {path.name!r} by its ending; give {FORMS}")
    if not path.is_file():
        raise InputError(f"no file of texts at {path}; give {FORMS}")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read ({error}); give {FORMS}, in UTF-8") from error
    # not `splitlines`, which also cuts at characters that JSON may hold as they are
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    if kind == ".txt":
        return [sentences_of(line) for _, line in lines]
    return _records(path.name, lines)


def _records(name: str, lines: Iterable[tuple[int, str]]) -> list[Story]:
    stories = []
    for number, line in lines:
        try:
            stories.append(_story(json.loads(line)))
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"line {number} of {name} is no story ({type(error).__name__}: {error}); each line"
                f" is a record {RECORDS}"
            ) from error
    return stories


def _story(record: Any) -> Story:
    """The sentences of one record; ValueError, LookupError or TypeError where it is none."""
    if not isinstance(record, dict):
        raise TypeError(f"a {type(record).__name__}, not an object")
    if "obs1" in record:
        middles = record["middles"]
        if not isinstance(middles, list):
            raise TypeError(f"middles are a {type(middles).__name__}, not a list")
        sentences = [record["obs1"], middles[0], record["obs2"]]
    elif record.get("sentences") is None:
        return sentences_of(_string(record["text"]))
    else:
        sentences = record["sentences"]
        if not isinstance(sentences, list):
            raise TypeError(f"sentences are a {type(sentences).__name__}, not a list")
        if "endings" in record:
            sentences = [*sentences, _right_ending(record["endings"], record["right"])]
    return tuple(part for part in (_normalised(_string(one)) for one in sentences) if part)


def _right_ending(endings: Any, right: Any) -> str:
    if not (isinstance(right, int) and 0 <= right < len(endings)):
        raise ValueError(f"the right ending is {right!r} of {len(endings)}, counted from 0")
    return endings[right]


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
