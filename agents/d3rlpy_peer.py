"""The outside peer: d3rlpy's IQL or CQL, trained by d3rlpy itself and evaluated as every program.

    python -m venv peers
    peers/bin/pip install d3rlpy==2.8.1 torch==2.13.0
    rtb-rl run d3rlpy_peer --python peers/bin/python --algorithm cql --dataset hopper-medium-v2

d3rlpy gets the same transitions with the same rewards as the critics of this package, and its own
defaults for all else. Its scripts for D4RL differ from these: there IQL's learning rate falls along
a cosine, and CQL has three hidden layers and a fixed weight of its penalty
(takuseno/d3rlpy: reproductions/offline). Training that was killed starts again: d3rlpy can't be
resumed exactly.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

from rtb_rl.rl import JobSettings, open_job
from rtb_rl.rl.peers.d3rlpy_peer import (
    D3rlpySettings,
    d3rlpy_versions,
    fit_d3rlpy,
    given_interpreter,
    note_versions,
)

STEPS = {
    "iql": {"smoke": 300, "demo": 15_000, "full": 200_000},
    "cql": {"smoke": 30, "demo": 2_000, "full": 200_000},
}


@dataclass(frozen=True)
class Settings(JobSettings):
    """d3rlpy's IQL or CQL."""

    python: Path | None = None
    """Interpreter of an environment that holds d3rlpy 2."""
    algorithm: Literal["iql", "cql"] = "iql"
    steps: int | None = None
    """Updates; not given: as the budget says, 200,000 in full, which take CQL hours on a CPU."""
    batch: int = 256

    def check(self) -> None:
        super().check()
        own_settings(self)
        given_interpreter(self.python)


def own_settings(settings: Settings) -> D3rlpySettings:
    """Those of d3rlpy's training."""
    steps = STEPS[settings.algorithm][settings.budget] if settings.steps is None else settings.steps
    return D3rlpySettings(settings.algorithm, steps=steps, batch=settings.batch)


def main(settings: Settings) -> None:
    """Have d3rlpy train its policy, then evaluate that."""
    chosen, python = own_settings(settings), given_interpreter(settings.python)
    versions = d3rlpy_versions(python)
    method = f"d3rlpy_{settings.algorithm}"
    job = open_job(
        settings,
        program="d3rlpy_peer",
        method=method,
        tuning_file=Path(__file__).with_name("rtb_iql.toml"),
        own={"d3rlpy": {**asdict(chosen), "versions": versions}},
    )
    note_versions(job.out, versions)
    stage = job.out / "d3rlpy"
    fit_d3rlpy(
        stage,
        job.dataset,
        chosen,
        python=python,
        versions=versions,
        critic_settings=job.budget.critic,
        seed=settings.seed,
        watch=job.curve(stage),
        watched=settings.curve,
    )
    job.finish([method], trained="d3rlpy")


if __name__ == "__main__":
    main(tyro.cli(Settings))
