"""Prompts as they are given: one, several, or a file, with what a reward may want to know."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtb_rl.errors import InputError

KEY = "prompt"


@dataclass(frozen=True)
class PromptList:
    """Prompts, each once, and for each what a reward gets as its metadata. InputError for no prompt
    and for one that comes twice.
    """

    texts: tuple[str, ...]
    metadata: tuple[Mapping[str, Any], ...]

    def __post_init__(self):
        if not self.texts:
            raise InputError("there is no prompt; give at least one")
        if len(self.metadata) != len(self.texts):
            raise InputError(
                f"{len(self.texts)} prompts came with metadata for {len(self.metadata)}; give one"
                " entry a prompt"
            )
        if twice := [text for text, times in Counter(self.texts).items() if times > 1]:
            raise InputError(
                f"the prompt {twice[0]!r} is there {self.texts.count(twice[0])} times, and results"
                " go by the prompt's text; give each once, or word them differently where their"
                " metadata differ"
            )

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def facts(self) -> dict[str, Any]:
        """What a run's configuration says of them."""
        known = {"metadata": [dict(one) for one in self.metadata]} if any(self.metadata) else {}
        return {"prompts": list(self.texts), **known}


def prompt_list(texts: str | Sequence[str]) -> PromptList:
    """One prompt, or several, without metadata."""
    given = (texts,) if isinstance(texts, str) else tuple(texts)
    return PromptList(given, tuple({} for _ in given))


def read_prompts(path: str | Path) -> PromptList:
    """The prompts of a file: .jsonl with "prompt" and any metadata a line, else one a line.

    Empty lines are skipped. InputError for a file that can't be read, or holds no prompt.
    """
    path = Path(path)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"prompts can't be read from {path} ({error}); give a text file with one prompt a line,"
            ' or a .jsonl file with "prompt" in every line'
        ) from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not numbered:
        raise InputError(f"{path} holds no prompt; write one a line")
    if path.suffix != ".jsonl":
        return prompt_list([line for _, line in numbered])
    rows = [_row(path, number, line) for number, line in numbered]
    texts = tuple(row.pop(KEY) for row in rows)
    return PromptList(texts, tuple(rows))


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get(KEY), str):
        raise InputError(
            f'line {number} of {path} is no JSON object with a text under "{KEY}"; write for'
            f' example {{"{KEY}": "a red circle"}}'
        )
    return row
