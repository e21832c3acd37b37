"""Checkpoints of anything with a state_dict: tensors as safetensors, the rest as JSON, no pickle.

A checkpoint is a directory `step_00001000/` with `tensors.safetensors` and `state.json`. It is
written under another name, flushed to disk and renamed, so that it is either whole or not there;
its digests are checked before it is used, and a damaged one is passed over for the one before it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from rtb_rl.errors import CheckpointError, NonFiniteError


class Stateful(Protocol):
    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


def save_checkpoint(
    directory: Path, step: int, parts: Mapping[str, Stateful], *, keep: int = 2
) -> Path:
    """Write the parts' states as of `step` and forget all but the newest `keep` checkpoints.

    Raises CheckpointError where the disk refuses, and NonFiniteError for a state with NaN, which a
    gradient that is not finite leaves behind a finite loss; both name the newest checkpoint there.
    """
    target = directory / f"step_{step:08d}"
    partial = directory / f".partial_{step:08d}"
    tensors: dict[str, Tensor] = {}
    state = {name: _pack(part.state_dict(), name, tensors) for name, part in parts.items()}
    _check_no_nan(directory, step, tensors)
    data = save_tensors(tensors)
    record = {
        "step": step,
        "sha256": hashlib.sha256(data).hexdigest(),
        "parts_sha256": _digest_of(state),
        "parts": state,
    }
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_durably(partial / "tensors.safetensors", data)
        write_durably(partial / "state.json", json.dumps(record).encode())
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        _flush_directory(directory)
    except OSError as error:
        good = newest_checkpoint(directory)
        raise CheckpointError(
            f"can't write the checkpoint of step {step} to {directory}: {error.strerror}; the last"
            f" good one is {good.name if good else 'none'}. Free space or fix the permissions and"
            " run the same command again"
        ) from error
    for old in _checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(
    directory: Path, warn: Callable[[str], None], *, at_most: int | None = None
) -> tuple[int, dict] | None:
    """(step, {part: state}) of the newest whole checkpoint, of step `at_most` or before; None where
    there is none at all.

    Calls `warn` for each damaged one passed over. Raises CheckpointError when all are damaged.
    """
    found = [
        path
        for path in _checkpoints(directory)
        if at_most is None or int(path.name.removeprefix("step_")) <= at_most
    ]
    for path in reversed(found):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            warn(f"checkpoint {path} is damaged ({error}); falling back to the one before it")
    if found:
        raise CheckpointError(
            f"all {len(found)} checkpoints in {directory} are damaged or not of this package;"
            " remove that directory to start the stage again"
        )
    return None


def newest_checkpoint(directory: Path) -> Path | None:
    """The directory of the newest checkpoint, whole or not."""
    found = _checkpoints(directory)
    return found[-1] if found else None


def write_durably(path: Path, data: bytes) -> None:
    """Write and flush to disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step: a reader sees the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    write_durably(partial, data)
    os.replace(partial, path)


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("step_*")) if directory.is_dir() else []


def _read(path: Path) -> tuple[int, dict]:
    record = json.loads((path / "state.json").read_bytes())
    data = (path / "tensors.safetensors").read_bytes()
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise ValueError("its tensors don't match their digest")
    if record.get("parts_sha256") not in (None, _digest_of(record["parts"])):
        raise ValueError("its state.json doesn't match its digest")
    try:
        tensors = load_tensors(data)
    except Exception as error:
        raise ValueError(f"its tensors can't be read: {error}") from error
    return record["step"], {name: _unpack(part, tensors) for name, part in record["parts"].items()}


def _digest_of(state: Any) -> str:
    """sha256 of plain data as JSON, which reads back as it was written."""
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _check_no_nan(directory: Path, step: int, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            good = newest_checkpoint(directory)
            raise NonFiniteError(
                f"{name} holds NaN after step {step}; stopped, and nothing of it is kept. The last"
                f" good checkpoint is {good or 'none'}. Lower the learning rate, or look for bad"
                " values in the data"
            )


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; its tensors go to `tensors` under names that begin with `name`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]
        return {"mapping": items}
    if isinstance(value, list | tuple):
        return {"list": [_pack(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}; checkpoints hold tensors and plain data")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "mapping":
        return {key: _unpack(item, tensors) for key, item in content}
    if kind == "list":
        return [_unpack(item, tensors) for item in content]
    raise ValueError(f"unknown content {kind!r}")


def _flush_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
