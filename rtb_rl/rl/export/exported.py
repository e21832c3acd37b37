"""Policies read back from the files that `rtb-rl export` writes."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from rtb_rl.errors import InputError
from rtb_rl.rl.export.module import draw_noise
from rtb_rl.rl.export.tracing import FACTS, needed_for


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy read from a file: acts as the one that was exported, for the same generator."""

    run: Callable[[Tensor, Tensor], Tensor]
    """(observations, noise) -> actions."""
    facts: dict[str, Any]
    """What is written in the file: method, env_id, data_sha256, beta, levels, versions, ..."""

    @property
    def env_id(self) -> str | None:
        return self.facts["env_id"]

    @property
    def reference_returns(self) -> tuple[float, float] | None:
        reference = self.facts["reference_returns"]
        return tuple(reference) if reference else None

    @torch.no_grad()
    def act(self, observations: Tensor, *, generator: Generator) -> Tensor:
        """Actions [batch, d_a] in the environment's units, on the CPU; InputError for other
        observations than the policy's.
        """
        size = self.facts["observation_size"]
        if observations.ndim != 2 or observations.shape[1] != size:
            raise InputError(
                f"observations have shape {list(observations.shape)}, the exported policy takes"
                f" [batch, {size}]; give those of {self.env_id}"
            )
        rows = len(observations) * self.facts["candidates"]
        noise = draw_noise(
            self.facts["draws"], rows, self.facts["action_size"], generator=generator
        )
        return self.run(observations.float().cpu(), noise.cpu())


def load_exported(path: str | Path) -> LoadedPolicy:
    """The policy in a file that `export_policy` wrote, whatever the file is called.

    InputError for any other file. torch.export may unpickle what a .pt2 file holds: load those
    that you trust. An .onnx file has no code.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"can't read {path}: {error.strerror}; give a file that rtb-rl export wrote"
        ) from error
    needed_for("torch" if data[:2] == b"PK" else "onnx", reading=True)
    try:
        run, text = _load_torch(data) if data[:2] == b"PK" else _load_onnx(data)
        return LoadedPolicy(run, json.loads(text))
    except Exception as error:
        raise InputError(
            f"{path} holds no policy ({str(error).splitlines()[0] if str(error) else error!r});"
            " give a file that rtb-rl export wrote"
        ) from error


def _load_torch(data: bytes) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    extra = {f"{FACTS}.json": ""}
    program = torch.export.load(io.BytesIO(data), extra_files=extra)
    return program.module(), extra[f"{FACTS}.json"]


def _load_onnx(data: bytes) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # more cost more than they save on networks of this size
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(observations: Tensor, noise: Tensor) -> Tensor:
        given = {"observations": observations.numpy(), "noise": noise.numpy()}
        return torch.from_numpy(session.run(["actions"], given)[0])

    return run, session.get_modelmeta().custom_metadata_map[FACTS]
