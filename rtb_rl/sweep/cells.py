"""A cell of a grid: one program on one task with one seed, in a directory of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtb_rl.sweep.programs import launcher

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Cell:
    """`dataset` is what its program is given; `words` the rest of the program's command line."""

    task: str
    agent: str
    seed: int
    dataset: str
    program: str
    words: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> Key:
        """(task, agent, seed)."""
        return self.task, self.agent, self.seed

    @property
    def title(self) -> str:
        """How it is named to a reader."""
        return f"{self.task}, {self.agent}, seed {self.seed}"

    @property
    def path(self) -> Path:
        """Its directory, seen from that of the grid."""
        return Path("cells", self.task, self.agent, f"seed{self.seed}")

    def options(self, root: Path) -> list[str]:
        """The options of its program, in a grid whose directory is `root`."""
        given = {
            "dataset": self.dataset,
            "seed": self.seed,
            "out": root / self.path,
            "stages": root / "stages",
        }
        return [*(f"--{name}={value}" for name, value in given.items()), *self.words]

    def command(self, root: Path) -> list[str]:
        """What starts it."""
        return [*launcher(self.program), *self.options(root)]

    def is_finished(self, root: Path) -> bool:
        """Whether its program wrote its results, which is the last that it does."""
        return (root / self.path / "results.json").exists()
