"""Texts with a gap, as a masked diffusion sees them: context, slots for what is missing, and back.

A sequence is left context, gap, right context, padding. The gap has as many slots as the sentence
that was there, or always the same number, of which the last are filled with the end token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from rtb_rl.core import conditions
from rtb_rl.errors import InputError
from rtb_rl.tasks.language.codec import TextCodec
from rtb_rl.tasks.language.texts import Story

Ids = list[list[int]]


class Gap(NamedTuple):
    """A text in which something is missing: what comes before, what comes after, and what was
    there, if that is known.
    """

    left: str
    right: str
    middle: str | None = None


@dataclass(frozen=True)
class Frame:
    """How texts become the points and conditions of a masked diffusion.

    `slots`: positions that can be free, the longest gap; `window`: tokens of the longest sequence.
    With `ends` a gap has `slots` tokens, and those from the first end token on are no text; without
    it a gap has the length that is asked for, and no end token.
    """

    codec: TextCodec
    slots: int
    window: int
    ends: bool = False

    @property
    def never(self) -> tuple[int, ...]:
        """Tokens that are not drawn."""
        return self.codec.never if self.ends else (*self.codec.never, self.codec.end)

    def points(self, middles: Sequence[str]) -> Ids:
        """The tokens of each text in a gap. InputError for one that has no place there."""
        ids = self.codec.encode([f" {middle}" for middle in middles])
        for text, each in zip(middles, ids, strict=True):
            if not 0 < len(each) <= self.slots - self.ends:
                raise InputError(
                    f"{text!r} has {len(each)} tokens and a gap 1 to {self.slots - self.ends}; make"
                    " it shorter, or train a prior with longer gaps"
                )
        fill = [self.codec.end]
        return [each + fill * (self.slots - len(each)) * self.ends for each in ids]

    def texts(self, x0: Tensor, condition: dict[str, Tensor]) -> list[str]:
        """The texts of points [batch, slots]."""
        used = (condition["free"] >= 0).tolist()
        rows = [
            [token for token, slot in zip(row, of_row, strict=True) if slot]
            for row, of_row in zip(x0.tolist(), used, strict=True)
        ]
        end = self.codec.end
        return self.codec.decode([row[: row.index(end)] if end in row else row for row in rows])


@dataclass(frozen=True)
class Prompts:
    """Gaps with their conditions, a row each.

    `condition`: "tokens" int64 [n, window], "free" int64 [n, slots] and -1, as `Infilling` has
    them; "right" bool [n, window], where the right context is; "row" int64 [n], the place in
    `gaps`. `x0`: int64 [n, slots], what was there; None where that is not known of all.
    """

    frame: Frame
    gaps: Sequence[Gap]
    condition: dict[str, Tensor]
    x0: Tensor | None = None

    @classmethod
    def of(
        cls, frame: Frame, gaps: Sequence[Gap], lengths: Sequence[int] | None = None
    ) -> "Prompts":
        """Gaps of the lengths given, in tokens; not given: those of what was there, or of the
        frame. InputError for a text without left context, or longer than the window.
        """
        known = lengths is None and all(gap.middle is not None for gap in gaps)
        points = frame.points([gap.middle or "" for gap in gaps]) if known else None
        if lengths is None and points is None and not frame.ends:
            raise InputError("how long the gap is must be told, in tokens; give a length")
        left = frame.codec.encode([gap.left for gap in gaps])
        right = frame.codec.encode([f" {gap.right}" if gap.right else "" for gap in gaps])
        if points is not None:
            lengths = [len(point) for point in points]
        elif frame.ends or lengths is None:
            lengths = [frame.slots] * len(gaps)
        rows = list(zip(left, lengths, right, strict=True))
        for gap, row in zip(gaps, rows, strict=True):
            _check(frame, gap, *row)
        return cls(frame, gaps, _condition(frame, rows), _padded(points, frame.slots, 0))

    def to(self, device: torch.device) -> "Prompts":
        condition = conditions.move(self.condition, device)
        assert isinstance(condition, dict)
        x0 = None if self.x0 is None else self.x0.to(device)
        return Prompts(self.frame, self.gaps, condition, x0)

    def with_baseline(self, log_weight: Tensor) -> "Prompts":
        """The same with a guess of log Z of each, [n], as "baseline" of the condition."""
        baseline = log_weight.float().to(self.condition["tokens"].device)
        return replace(self, condition={**self.condition, "baseline": baseline})

    def draw(self, n: int, *, generator: Generator) -> tuple[dict[str, Tensor], None]:
        """`n` conditions, uniformly with replacement; what was there may not be drawable."""
        return self._rows(self._index(n, generator)), None

    def examples(self, n: int, *, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """`n` points of what was there with their conditions, to learn from.

        Tokens that are never drawn, such as unknown words, are given as context. InputError where
        what was there is not known.
        """
        if self.x0 is None:
            raise InputError("these gaps have no known middles to learn from; give gaps with them")
        index = self._index(n, generator)
        condition, x0 = self._rows(index), self.x0[index]
        free, tokens = condition["free"], condition["tokens"]
        barred = torch.tensor(self.frame.never, device=x0.device)
        given = torch.isin(x0, barred) & (free >= 0)
        row, slot = given.nonzero(as_tuple=True)
        tokens = tokens.index_put((row, free[row, slot]), x0[row, slot])
        unused = given | (free < 0)
        condition |= {"tokens": tokens, "free": free.masked_fill(given, -1)}
        return x0.masked_fill(unused, 0), condition

    def _index(self, n: int, generator: Generator) -> Tensor:
        device = generator.device
        return torch.randint(len(self.gaps), (n,), generator=generator, device=device)

    def _rows(self, index: Tensor) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.condition.items()}

    def written(self, x0: Tensor, condition: dict[str, Tensor]) -> list[Gap]:
        """The gaps of the rows of a condition, with points [batch, slots] as their middles."""
        rows = [self.gaps[row] for row in condition["row"].tolist()]
        middles = self.frame.texts(x0, condition)
        return [gap._replace(middle=text) for gap, text in zip(rows, middles, strict=True)]


def story_gaps(stories: Sequence[Story], hidden: int) -> list[Gap]:
    """Each story without its sentence number `hidden`, counted from 0."""
    return [
        Gap(" ".join(story[:hidden]), " ".join(story[hidden + 1 :]), story[hidden])
        for story in stories
    ]


def _condition(frame: Frame, rows: Sequence[tuple[list[int], int, list[int]]]) -> dict[str, Tensor]:
    mask = frame.codec.mask
    tokens = [left + [mask] * length + right for left, length, right in rows]
    free = [list(range(len(left), len(left) + length)) for left, length, _ in rows]
    begin = torch.tensor([len(left) + length for left, length, _ in rows])[:, None]
    end = torch.tensor([len(row) for row in tokens])[:, None]
    column = torch.arange(frame.window)
    padded, slots = _padded(tokens, frame.window, frame.codec.pad), _padded(free, frame.slots, -1)
    assert padded is not None and slots is not None
    return {
        "tokens": padded,
        "free": slots,
        "right": (begin <= column) & (column < end),
        "row": torch.arange(len(rows)),
    }


def _padded(rows: Sequence[list[int]] | None, length: int, fill: int) -> Tensor | None:
    if rows is None:
        return None
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows], dtype=torch.int64)


def _check(frame: Frame, gap: Gap, left: list[int], length: int, right: list[int]) -> None:
    total = len(left) + length + len(right)
    if not left:
        raise InputError("there is no text before the gap; give a left context of a word or more")
    if not 0 < length <= frame.slots:
        raise InputError(
            f"a gap of {length} tokens is asked for, and gaps of this prior have 1 to {frame.slots}"
        )
    if total > frame.window:
        raise InputError(
            f"{gap.left[:40]!r}... has {total} tokens with its gap and right context, more than the"
            f" window of {frame.window}; shorten the contexts, or take a prior with a longer window"
        )
