"""What a stage was fitted with, read from its directory."""

import json
from pathlib import Path
from typing import Any

from rtb_rl.errors import InputError


def fitted_config(directory: Path) -> dict[str, Any]:
    """config.json of a stage; InputError for a directory without one."""
    path = directory / "config.json"
    if not path.exists():
        raise InputError(
            f"{directory} holds no fitted stage (no config.json); give the directory of a stage "
            "that was run"
        )
    return json.loads(path.read_text())


def finished_config(directory: Path) -> dict[str, Any]:
    """config.json of a stage that is complete; InputError for one that is not."""
    config = fitted_config(directory)
    check_finished(directory)
    return config


def check_finished(directory: Path) -> None:
    """InputError for a stage, or a run, that was not run to its end."""
    if not (directory / "results.json").exists():
        raise InputError(
            f"{directory} is not finished (no results.json); run the same command again"
        )
