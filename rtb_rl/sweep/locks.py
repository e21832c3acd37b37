"""Locks of directories, which a process holds together with those it hands them to."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rtb_rl.errors import InputError


def take_lock(path: Path) -> int | None:
    """An open file that holds the lock of `path`; None where another process holds it.

    The lock is free when the last process that has this file open has ended, in whatever way. A
    child that is started with `pass_fds` holds it too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError as error:
        os.close(handle)
        raise InputError(
            f"{path} can't be locked ({error.strerror}); give an --out on a file system with locks"
        ) from error
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle


@contextmanager
def grid_lock(root: Path) -> Iterator[None]:
    """Hold the lock of a grid's directory.

    InputError where another runner has it, or where nothing can be written.
    """
    path = root / "runner.lock"
    try:
        handle = take_lock(path)
    except OSError as error:
        raise InputError(
            f"can't write {root}: {error.strerror}; give another --out or make room there"
        ) from error
    if handle is None:
        raise InputError(
            f"{root} is being filled by {path.read_text().strip()}; wait for it, end it, or give "
            "another --out"
        )
    try:
        yield
    finally:
        os.close(handle)
