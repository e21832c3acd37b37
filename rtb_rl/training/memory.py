"""Peak memory of work, in a fresh process."""

import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_memory(work: Callable[[], object]) -> float:
    """Largest resident memory of a process of its own that does `work`, MiB, libraries included.

    `work` is a function of a module, or a partial of one: it is found again by its name.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_after, work).result()


def _peak_after(work: Callable[[], object]) -> float:
    work()
    return peak_of_this_process() / 1024**2


def peak_of_this_run() -> int:
    """That of this process, or of the largest that it has started and that has ended: bytes."""
    children = _in_bytes(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    return max(peak_of_this_process(), children)


def peak_of_this_process() -> int:
    """Largest resident memory so far, bytes, libraries included."""
    if STATUS.exists():  # what getrusage says includes the parent's peak on Linux
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return _in_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _in_bytes(peak: int) -> int:
    return peak if sys.platform == "darwin" else peak * 1024
