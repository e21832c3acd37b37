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
