"""A program that writes what a finished run leaves, at once or after a while, and counts itself.

It leaves `again` where it finds results, and `overlap` where another process of it works in the
same directory: neither may ever happen in a grid.
"""

import fcntl
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Counting."""

    dataset: str
    out: Path
    stages: Path
    seed: int = 0
    env_id: str | None = None
    budget: str = "full"
    beta: float | None = None
    wait: float = 0.0
    fail: str | None = None
    """A file: fails while it is there."""
    odd: bool = False


def main(options: dict[str, str]) -> None:
    out, begun = Path(options["out"]), time.monotonic()
    own = os.open(out / "own.lock", os.O_WRONLY | os.O_CREAT)  # open until the process ends
    try:
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        (out / "overlap").touch()
    if (out / "results.json").exists():
        (out / "again").touch()
    with open(out / "begun", "a") as file:
        file.write("begun\n")
    print("counting", flush=True)
    if "fail" in options and Path(options["fail"]).exists():
        raise RuntimeError(f"there is {Path(options['fail']).name}")
    time.sleep(float(options.get("wait", 0)))
    seed = int(options["seed"])
    config = {"method": "count", "budget": "full", "seed": seed}
    (out / "config.json").write_text(json.dumps(config))
    results = {
        "methods": {"count": {"returns": [float(seed)], "lengths": [1]}},
        "dataset": {
            "dataset": Path(options["dataset"]).stem,
            "data_sha256": "0",
            "env_id": "Pendulum-v1",
            "reference_returns": None,
        },
        "manifest": {"commit": None, "created": "2026-01-01T00:00:00Z"},
        "timings": {},
        "diagnostics": {},
        "versions": {},
        "wall_seconds": time.monotonic() - begun,
    }
    (out / "part.json").write_text(json.dumps(results))
    (out / "part.json").rename(out / "results.json")


def given() -> dict[str, str]:
    """The options of this process, unchecked."""
    words = [word.removeprefix("--").partition("=") for word in sys.argv[1:]]
    return {name.replace("-", "_"): value for name, _, value in words}


if __name__ == "__main__":
    main(given())
