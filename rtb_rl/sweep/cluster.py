"""Cells of a grid as tasks of a Ray cluster.

Each cell is a task of one processor; inside, its program runs in a process that ends with the
worker. Ray starts a task again when its worker or node dies; the lock of the cell and its
results.json see to it that nothing runs twice. Cells write into the directory of the grid wherever
they run, so that every node must see it, the data and the interpreter under the same paths.

Ray is used in a process of its own, the driver, because a driver whose cluster is gone is aborted
from inside Ray: what the runner sees of it is then one error.
"""

import importlib.util
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rtb_rl.errors import InputError
from rtb_rl.sweep.attempt import Outcome, begin, last_line
from rtb_rl.sweep.cells import Cell
from rtb_rl.sweep.local import HELD, POLL, Ended, Started
from rtb_rl.sweep.stopping import stop_requested

LOOK = 1.0  # seconds between two looks at the cluster and at what has started
SILENCE = 5  # looks without an answer of the cluster until it counts as gone
END = 10.0  # seconds for the driver to end by itself
PASSED_ON = (
    "PYTHONPATH",
    "HF_HUB_OFFLINE",
    "D4RL_DATASET_DIR",
    "MINARI_DATASETS_PATH",
    "MUJOCO_GL",
)


@dataclass(frozen=True)
class Job:
    """A cell as a worker needs it: directory, command, environment, working directory."""

    directory: Path
    command: list[str]
    variables: dict[str, str]
    working: str

    def run(self) -> Outcome:
        """Run the command to its end, after any process that is at work on this cell."""
        attempt = None
        while attempt is None:
            attempt = begin(
                self.directory, self.command, variables=self.variables, working=self.working
            )
            time.sleep(0.0 if attempt else HELD)
        if isinstance(attempt, Outcome):
            return attempt
        while (outcome := attempt.poll()) is None:
            time.sleep(POLL)
        return outcome


def run_on_cluster(
    cells: Sequence[Cell],
    root: Path,
    *,
    address: str,
    workers: int,
    started: Started,
    ended: Ended,
) -> None:
    """Run the cells on the Ray cluster at `address`, in their order, and say how each ended.

    "local" makes a cluster of `workers` processors on this machine. SIGINT and SIGTERM end what
    runs and raise KeyboardInterrupt. InputError without Ray or a cluster, also where it goes away:
    the directory can then be continued.
    """
    if not cells:
        return
    if importlib.util.find_spec("ray") is None:
        raise InputError("there is no ray; pip install 'rtb-rl[benchmarks]', or leave --executor")
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    jobs = [Job(root / c.path, c.command(root), variables, os.getcwd()) for c in cells]
    log, left = root / "ray.log", set(cells)
    begun = _starts(cells, root)
    with _driver(jobs, address, workers, log) as connection, stop_requested() as stopping:
        while left:
            if stopping():
                raise KeyboardInterrupt
            for cell in begun(left):
                started(cell)
            if not connection.poll(LOOK):
                continue
            try:
                number, outcome = connection.recv()
            except (EOFError, ConnectionError) as error:
                raise _lost(address, log, len(left)) from error
            if number is None:
                raise _lost(address, log, len(left), outcome)
            left.discard(cells[number])
            ended(cells[number], outcome)


def _lost(address: str, log: Path, left: int, reason: str | None = None) -> InputError:
    return InputError(
        f"no Ray cluster at {address} ({reason or last_line(log) or 'its driver ended'}); {left} "
        f"cells are left: start a cluster and run the same command to go on. More is in {log}"
    )


def _starts(cells: Sequence[Cell], root: Path) -> Callable[[set[Cell]], Iterator[Cell]]:
    """A function that yields, once each, those of some cells whose lock was taken since now."""

    def taken(cell: Cell) -> int:
        path = root / cell.path / "cell.lock"
        return path.stat().st_mtime_ns if path.exists() else 0

    before = {cell: taken(cell) for cell in cells}

    def begun(left: set[Cell]) -> Iterator[Cell]:
        for cell in [cell for cell in before if cell in left and taken(cell) != before[cell]]:
            del before[cell]
            yield cell

    return begun


@contextmanager
def _driver(jobs: Sequence[Job], address: str, workers: int, log: Path) -> Iterator[Connection]:
    """Where the outcomes come from, as pairs (number, Outcome) or (None, what is wrong)."""
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    arguments = (theirs, os.getpid(), list(jobs), address, workers, log)
    process = context.Process(target=drive, args=arguments, daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
        process.join(END)
    finally:
        process.terminate()
        process.join(END)
        process.kill()


def drive(
    results: Connection, parent: int, jobs: Sequence[Job], address: str, workers: int, log: Path
) -> None:
    """Submit the jobs and send each outcome; ends with its parent or when all are done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that of a terminal comes to the runner, too
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray  # pyright: ignore[reportMissingImports]

    own = {"num_cpus": workers, "include_dashboard": False} if address == "local" else {}
    if ":" in address and not _answers(address):  # Ray itself would try for minutes
        results.send((None, "nothing answers there"))
        return
    try:
        ray.init(address, log_to_driver=False, **own)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        results.send((None, str(error).splitlines()[0]))
        return
    task = ray.remote(num_cpus=1, max_retries=-1)(Job.run)
    lost = _collect(ray, {task.remote(job): n for n, job in enumerate(jobs)}, results, parent)
    if lost is not None:
        results.send((None, lost))
        os._exit(1)  # a shutdown would wait for the cluster
    ray.shutdown()


def _collect(ray: Any, left: dict[Any, int], results: Connection, parent: int) -> str | None:
    """Send the outcome of each task as it comes; what is wrong where the cluster is gone."""
    head, silent = ray.get_runtime_context().gcs_address, 0
    while left and os.getppid() == parent:
        done, _ = ray.wait(list(left), timeout=LOOK)
        for reference in done:
            try:
                outcome = _outcome(ray, reference)
            except ray.exceptions.RayError as error:
                return f"{type(error).__name__}: {_last(error)}"
            results.send((left.pop(reference), outcome))
        silent = 0 if done or _answers(head) else silent + 1
        if silent == SILENCE:
            return "it does not answer any more"
    return None


def _outcome(ray: Any, reference: Any) -> Outcome:
    """Of a task that is done; what Ray could not keep alive is raised, and no failure of a cell."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        return Outcome(f"on its worker: {_last(error)}", 1)


def _last(error: Exception) -> str:
    """The last line of a message that has some text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _answers(address: str) -> bool:
    """Whether something listens at HOST:PORT."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=LOOK):
            return True
    except (OSError, ValueError):
        return False
