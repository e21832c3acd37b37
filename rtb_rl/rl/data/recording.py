"""What a reader found, before it is checked and made into transitions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rtb_rl.rl.episodes.scores import EpisodeLog


@dataclass(frozen=True, eq=False)
class Recording:
    """What was found: the arrays as recorded, and what the source says of their environment.

    `log` where returns are counted in another unit than the rewards; None: they are their sums.
    """

    arrays: dict[str, Any]
    name: str
    source: str
    sha256: str
    env_id: str | None = None
    reference: tuple[float, float] | None = None
    action_box: tuple[Any, Any] | None = None
    notes: tuple[str, ...] = ()
    log: EpisodeLog | None = None


def references(attributes: Mapping[str, Any]) -> tuple[float, float] | None:
    """(random, expert) return, where the data set states both."""
    low, high = attributes.get("ref_min_score"), attributes.get("ref_max_score")
    return None if low is None or high is None else (float(low), float(high))
