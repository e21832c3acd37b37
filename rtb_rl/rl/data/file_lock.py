"""Locks of what several processes may want to make: one makes it, the others wait and take it."""

from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout
from rich.console import Console


def held_lock(path: Path, work: str) -> AcquireReturnProxy:
    """The lock of `path`, held until the end of a `with`; says which work of another process has to
    be waited for.

    The lock of a process that died is free. OSError where `path` can't be written.
    """
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)  # not the lock, which `with` would take a second time
    except Timeout:
        told = f"waiting for the run that {work}"
        Console(stderr=True).print(told, highlight=False, markup=False, soft_wrap=True)
        return lock.acquire()


def data_set_lock(root: Path, dataset_id: str) -> Path:
    """The lock of a Minari data set, hidden from Minari in the folder `root` of all of them."""
    return root / f".{dataset_id.replace('/', '_')}.lock"
