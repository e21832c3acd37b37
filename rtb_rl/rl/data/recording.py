"""What a reader found, before it is checked and made into transitions."""

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
