"""One attempt at a cell: its program as a process of its own, and how that ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rtb_rl.sweep.locks import take_lock

ATTACHED = Path(__file__).with_name("attached.py")
LOG = "cell.log"
GRACE = 5.0  # seconds between SIGTERM and SIGKILL
VARIABLES = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: `error` is None where the cell is finished.

    `seconds` it took and `peak_memory_bytes` are None where the cell was finished before. The peak
    is that of the operating system, which counts what the runner had when it started the process.
    """

    error: str | None = None
    status: int = 0
    seconds: float | None = None
    peak_memory_bytes: int | None = None


@dataclass
class Attempt:
    """A running process in the directory of its cell, which is locked until it ends."""

    directory: Path
    process: subprocess.Popen
    log_from: int
    begun: float = field(default_factory=time.monotonic)

    def poll(self) -> Outcome | None:
        """How it ended; None while it runs."""
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            return None
        code = self.process.returncode = os.waitstatus_to_exitcode(status)
        finished = code == 0 and (self.directory / "results.json").exists()
        return Outcome(
            error=None if finished else self._error(code),
            status=code,
            seconds=time.monotonic() - self.begun,
            peak_memory_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        )

    def signal(self, number: int) -> None:
        """Send a signal to the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _error(self, code: int) -> str:
        if code < 0:
            return f"ended by {signal.Signals(-code).name}" + (
                ", as where memory is out" if code == -signal.SIGKILL else ""
            )
        line = last_line(self.directory / LOG, start=self.log_from)
        if code == 0:
            return f"ended without results.json: {line}"
        return line or f"ended with status {code}"


def begin(
    directory: Path,
    command: Sequence[str],
    *,
    variables: Mapping[str, str] | None = None,
    working: str | None = None,
) -> Attempt | Outcome | None:
    """Start the command for the cell in `directory`; None where another process works on it, an
    Outcome where the cell is finished already.

    The process leads a session of its own, writes to cell.log, and ends with the one that called
    this (see attached.py), whose main thread must be the caller. `variables` are added to the
    environment; `working` is the working directory where it isn't this process's.
    """
    lock = take_lock(directory / "cell.lock")
    if lock is None:
        return None
    try:
        if (directory / "results.json").exists():
            return Outcome()
        with open(directory / LOG, "ab") as log:
            start = log.tell()
            process = subprocess.Popen(
                [sys.executable, "-I", str(ATTACHED), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(variables or {}), **VARIABLES},
                cwd=working,
                start_new_session=True,
                pass_fds=(lock,),
            )
    finally:
        os.close(lock)
    return Attempt(directory, process, start)


def end_all(attempts: Sequence[Attempt]) -> None:
    """End the processes of these attempts, by force those that take too long over it."""
    for attempt in attempts:
        attempt.signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    left = list(attempts)
    while left and time.monotonic() < deadline:
        left = [attempt for attempt in left if attempt.poll() is None]
        time.sleep(0.02)
    for attempt in left:
        attempt.signal(signal.SIGKILL)
        attempt.process.wait()


def last_line(log: Path, *, start: int = 0) -> str:
    """The last line of a log that is not blank, after byte `start`; empty where there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - 4000))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
