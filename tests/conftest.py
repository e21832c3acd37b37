"""What holds for every test: no network, one thread, and the process left as it was found."""

import os
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before a hub client is imported, which is when it is read
torch.set_num_threads(1)

LAYERS_SEED = 240520971  # no seed that a test would set

# What a test may change for itself but not leave changed: how it is read, how it is put back.
# Drawing from torch's global generator is allowed, because the layers of torch take their first
# weights from it; every test finds it at the same state, so that neither the order of tests nor
# the worker it runs on changes them. Seeding it is not allowed, because that hides who draws.
# numpy's may not be touched.
GLOBALS = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "the seed of torch's generator": (torch.initial_seed, torch.manual_seed),
    "numpy's generator": (np.random.get_state, np.random.set_state),
    "the working directory": (os.getcwd, os.chdir),
}


def snapshot() -> dict[str, object]:
    """The present value of each of the globals."""
    return {name: read() for name, (read, _) in GLOBALS.items()}


def put_back(before: dict[str, object]) -> list[str]:
    """Restore what differs from `before`; return its names."""
    after = snapshot()
    changed = [name for name in GLOBALS if pickle.dumps(before[name]) != pickle.dumps(after[name])]
    for name in changed:
        _, write = GLOBALS[name]
        write(before[name])
    return changed


@pytest.fixture(autouse=True)
def unchanged_process() -> Iterator[None]:
    """Fail the test that leaves one of the globals changed, and protect the tests after it."""
    torch.manual_seed(LAYERS_SEED)
    before = snapshot()
    yield
    changed = put_back(before)
    if changed:
        pytest.fail(f"the test left changed: {', '.join(changed)}", pytrace=False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed what fixtures of a module draw; skip what needs a CUDA device where there is none."""
    torch.manual_seed(LAYERS_SEED)
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
