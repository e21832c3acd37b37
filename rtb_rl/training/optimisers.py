"""Optimisers of fine-tuning, made from groups of parameters with learning rates of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from rtb_rl.errors import InputError

MakeOptimiser = Callable[[list[dict[str, Any]]], Optimizer]


def adamw(groups: list[dict[str, Any]]) -> Optimizer:
    """AdamW without weight decay."""
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def eight_bit_adamw(groups: list[dict[str, Any]]) -> Optimizer:
    """AdamW whose two moments take one byte each a parameter; needs bitsandbytes and a GPU.

    InputError where the package is missing.
    """
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore
    except ImportError as error:
        raise InputError(
            f"the 8-bit optimiser needs bitsandbytes ({error}): pip install bitsandbytes, or leave"
            " it out"
        ) from error
    return AdamW8bit(groups, weight_decay=0.0)
