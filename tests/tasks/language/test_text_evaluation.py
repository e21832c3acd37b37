"""The examiner compares on the CPU whatever device the reference lives on."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from rtb_rl.tasks.language.evaluation import Examiner, Infills
from rtb_rl.tasks.language.prompts import Gap

GAPS = [Gap("a b", "c d", "x y"), Gap("a b", "c d", "x z")]


class Elsewhere(Tensor):
    """A tensor of another device: like a GPU's, it does no arithmetic with one of the CPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in tree_flatten(args)[0] if isinstance(each, Tensor)]
        if any(type(each) is Tensor and each.ndim for each in tensors):
            raise RuntimeError(f"{func} of tensors on two devices")
        if func is Tensor.cpu:
            return args[0].as_subclass(Tensor)
        return super().__torch_function__(func, types, args, kwargs or {})


def elsewhere(values: list[float]) -> Elsewhere:
    return torch.tensor(values, dtype=torch.float64).as_subclass(Elsewhere)


def test_a_reference_on_another_device_is_compared_with():
    reference: Any = SimpleNamespace(
        log_weight=elsewhere([0.0, 0.0]),
        log_z=elsewhere([-1.0, -2.0]),
        mean=lambda values: (elsewhere([-3.0, -5.0]), None),
    )
    judge: Any = SimpleNamespace(perplexity=lambda before, texts: 1.0)
    examiner = Examiner(lambda gaps: elsewhere([-1.0] * len(gaps)), judge, GAPS, reference)
    found = examiner.examine(
        Infills([[gap] for gap in GAPS], 1.0, 1.0, log_z=elsewhere([-1.5, -1.5]))
    )
    assert found["log_reward_gap"] == pytest.approx(3.0)
    assert found["log_z_gap"] == pytest.approx(0.5) and found["log_z_bias"] == pytest.approx(0.0)
