"""Which critic a stage was fitted with: a digest that another critic doesn't share."""

import hashlib
import math

import torch
from torch import Tensor, nn

from rtb_rl.rl.critics.critic import Critic
from rtb_rl.rl.data.dataset import TransitionDataset
from rtb_rl.training.stage import fingerprint, tensors_of

ROWS = 32
BITS = 10  # kept of the largest value: edits show, the rounding of another processor doesn't


def critic_fingerprint(
    critic: Critic, dataset: TransitionDataset, *, device: torch.device | str = "cpu"
) -> str:
    """sha256 of the tensors of a critic of this package; of one's own that of its values in rows of
    the data set, with its tensors where it is a module.

    Two objects of one class may be two critics, and an edited class another one, so it is what they
    say that counts: q, and v where there is one, on `device`. A module's plain numbers are in none
    of its tensors.
    """
    digest = hashlib.sha256()
    if isinstance(critic, nn.Module) and tensors_of(critic):
        if told_by_tensors(critic):
            return fingerprint(critic)
        digest.update(fingerprint(critic).encode())
    rows = torch.linspace(0, len(dataset) - 1, ROWS).long()
    observations, actions = (
        table[rows.to(table.device)].to(device) for table in (dataset.observations, dataset.actions)
    )
    with torch.no_grad():
        for value, inputs in (("q", (observations, actions)), ("v", (observations,))):
            if (function := getattr(critic, value, None)) is not None:
                digest.update(_rounded(function(*inputs)))
    return digest.hexdigest()


def told_by_tensors(critic: Critic) -> bool:
    """Whether the tensors of a critic say all of it: those of this package's classes do."""
    return isinstance(critic, nn.Module) and type(critic).__module__.split(".")[0] == "rtb_rl"


def _rounded(values: Tensor) -> bytes:
    """The values, rounded to a power of two that is about 2^-BITS of the largest."""
    plain = values.detach().double().cpu().nan_to_num()
    # of 1.1 times the largest, so that one at a power of two doesn't fall on either side of it
    _, exponent = math.frexp(1.1 * float(plain.abs().max()))
    steps = (plain * 2.0 ** (BITS - exponent)).round().long()
    return f"{exponent} {steps.tolist()}\n".encode()
