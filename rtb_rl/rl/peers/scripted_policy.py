"""A policy that another library has exported as TorchScript."""

import hashlib
import io
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from rtb_rl.errors import CheckpointError
from rtb_rl.rl.episodes.action_box import to_box


class ScriptedPolicy(nn.Module):
    """Acts by a module of observations [batch, d_o] -> actions [batch, d_a] near [-1, 1].

    `action_low` and `action_high` [d_a] are the environment's box, onto which [-1, 1] is mapped;
    actions beyond it are clipped.
    """

    action_low: Tensor
    action_high: Tensor

    def __init__(self, module: nn.Module, *, action_low: Tensor, action_high: Tensor):
        super().__init__()
        self.module = module
        self.register_buffer("action_low", action_low.clone())
        self.register_buffer("action_high", action_high.clone())

    @torch.no_grad()
    def act(self, observations: Tensor, *, generator: Generator) -> Tensor:
        """One action a row, in the environment's units; nothing is drawn from `generator`."""
        actions = self.module(observations).clamp(-1, 1)
        return to_box(actions, self.action_low, self.action_high)


def load_scripted_policy(
    path: Path, *, action_low: Tensor, action_high: Tensor, sha256: str | None = None
) -> ScriptedPolicy:
    """The policy of a TorchScript file, on the CPU.

    torch reads such a file without Python's pickle, and runs no Python code of it. Raises
    CheckpointError for a file that is missing, of another sha256, or that this torch can't read.
    """
    try:
        data = path.read_bytes()
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("its sha256 is not that of the file that was written")
        module = torch.jit.load(io.BytesIO(data), map_location="cpu")
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} can't be loaded by torch {torch.__version__} ({reason}); remove {path.parent}"
            " and run the same command again"
        ) from error
    return ScriptedPolicy(module.eval(), action_low=action_low, action_high=action_high)
