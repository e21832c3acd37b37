"""What a data set holds, in the few numbers one looks at before training."""

from dataclasses import dataclass

import numpy as np

from rtb_rl.rl.data.dataset import TransitionDataset
from rtb_rl.rl.episodes.scores import normalised_score

SATURATED = 0.99


@dataclass(frozen=True)
class DatasetSummary:
    """Counts, returns of whole episodes (mean, least, largest; None without any) and remarks.

    `saturation` is the share of action components beyond 0.99 of the box. `normalised` is the
    normalised score of the mean return, None without reference returns (random, expert).
    """

    name: str
    source: str
    sha256: str
    env_id: str | None
    transitions: int
    observation_size: int
    action_size: int
    whole_episodes: int
    partial_episodes: int
    returns: tuple[float, float, float] | None
    normalised: float | None
    reference_returns: tuple[float, float] | None
    lengths: tuple[float, int, int]
    saturation: float
    terminated: int
    truncated: int
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The summary as aligned text, one fact a line."""
        facts = {
            "data set": f"{self.name} ({self.source}, sha256 {self.sha256[:12]})",
            "environment": self.env_id or "unknown (give env_id to evaluate)",
            "transitions": f"{self.transitions:,}, {self.observation_size} observed numbers, "
            f"{self.action_size} of action",
            "episodes": f"{self.whole_episodes:,} whole, {self.partial_episodes:,} partial, length "
            f"{self.lengths[0]:.1f} ({self.lengths[1]} to {self.lengths[2]})",
            "ends": f"{self.terminated:,} terminated, {self.truncated:,} truncated",
            "return": self._returns(),
            "actions": f"{self.saturation:.1%} beyond {SATURATED} of the box",
        }
        width = max(map(len, facts)) + 2
        lines = [f"{key:<{width}}{value}" for key, value in facts.items()]
        return lines + [f"{'note':<{width}}{note}" for note in self.notes]

    def _returns(self) -> str:
        if self.returns is None:
            return "no whole episode"
        mean, least, largest = self.returns
        text = f"{mean:.1f} ({least:.1f} to {largest:.1f})"
        if self.normalised is None or self.reference_returns is None:
            return f"{text}, no reference returns to normalise with"
        random, expert = self.reference_returns
        return f"{text}, normalised {self.normalised:.1f} (0 = {random:g}, 100 = {expert:g})"

    def __str__(self) -> str:
        return "\n".join(self.lines())


def summarise(dataset: TransitionDataset) -> DatasetSummary:
    """The summary of a data set; returns and lengths are those recorded, whatever was scaled."""
    log = dataset.log
    returns, lengths = log.returns[log.whole], log.lengths
    mean = float(returns.mean()) if len(returns) else None
    reference = dataset.reference_returns
    return DatasetSummary(
        name=dataset.name,
        source=dataset.source,
        sha256=dataset.sha256,
        env_id=dataset.env_id,
        transitions=len(dataset),
        observation_size=dataset.observation_size,
        action_size=dataset.action_size,
        whole_episodes=int(log.whole.sum()),
        partial_episodes=int((~log.whole).sum()),
        returns=None if mean is None else (mean, float(returns.min()), float(returns.max())),
        normalised=None if mean is None or not reference else normalised_score(mean, reference),
        reference_returns=reference,
        lengths=(float(np.mean(lengths)), int(lengths.min()), int(lengths.max())),
        saturation=(dataset.actions.abs() > SATURATED).float().mean().item(),
        terminated=int(dataset.terminated.sum()),
        truncated=int(dataset.truncated.sum()),
        notes=dataset.notes,
    )
