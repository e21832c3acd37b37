"""Files fetched once and kept: mirrors in turn, resumed where interrupted, checked by SHA-256.

D4RL files are kept where D4RL itself keeps them (D4RL_DATASET_DIR, or ~/.d4rl/datasets). D4RL
published no digests, so the one of the first download is written beside the file and holds from
then on.
"""

import hashlib
import http.client
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import minari
from filelock import AcquireReturnProxy
from minari.storage.datasets_root_dir import get_dataset_path
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from rtb_rl.errors import InputError
from rtb_rl.rl.catalogue import D4RLTask
from rtb_rl.rl.data.file_lock import data_set_lock, held_lock

TIMEOUT = 10.0  # seconds without an answer or a byte
CHUNK = 1 << 20
NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    ConnectionError,
)
MINARI_HOST = "https://huggingface.co"


def dataset_directory() -> Path:
    """Where D4RL files are kept."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()


def fetch_task(task: D4RLTask) -> Path:
    """The file of a D4RL task, from the cache or downloaded."""
    return fetch(task.urls, dataset_directory() / task.file_name)


def fetch(urls: Sequence[str], file: Path, *, sha256: str | None = None) -> Path:
    """`file`, downloaded from the first of `urls` that gives it unless it is there already.

    Its digest must be `sha256` where given, else the one recorded at the first download; otherwise
    a fresh download is removed and an InputError raised. An interrupted download is kept as a
    `.part` file and continued by the next call. What another process downloads is waited for.
    """
    if not file.exists():
        with _lock(file):
            if not file.exists():
                _download(urls, file, _expected(file, sha256))
                return file
    expected = _expected(file, sha256)
    if expected is not None and (digest := file_sha256(file)) != expected:
        raise InputError(
            f"{file} has SHA-256 {digest}, expected {expected}: it was changed or damaged; delete "
            "it to download it again"
        )
    return file


def _lock(file: Path) -> AcquireReturnProxy:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return held_lock(file.with_name(f"{file.name}.lock"), f"downloads {file.name}")
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: Path, error: OSError) -> InputError:
    return InputError(f"can't keep {file}: {error}; set D4RL_DATASET_DIR")


def _record(file: Path) -> Path:
    return file.with_name(file.name + ".sha256")


def _expected(file: Path, sha256: str | None) -> str | None:
    """The digest that the file must have, None where nothing says."""
    record = _record(file)
    if sha256 is not None or not record.exists():
        return sha256
    return record.read_text().partition(" ")[0]


def _download(urls: Sequence[str], file: Path, expected: str | None) -> None:
    part = _first_that_gives(urls, file)
    digest = file_sha256(part)
    if expected not in {None, digest}:
        part.unlink()
        raise InputError(
            f"{file.name} was downloaded with SHA-256 {digest}, expected {expected}; the download "
            f"was removed: try again, or delete {_record(file)} if the published file is new"
        )
    _record(file).write_text(f"{digest}  {file.name}\n")  # first: who finds the file reads it
    part.replace(file)


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_that_gives(urls: Sequence[str], file: Path) -> Path:
    """The complete `.part` file from the first address that gives one."""
    failures = []
    try:
        for url in urls:
            part = _part_file(url, file)
            try:
                _continue_while_it_grows(url, part)
                return part
            except NETWORK_ERRORS as error:
                failures.append(f"{url} ({error})")
            except TimeoutError:
                failures.append(f"{url} (no answer in {TIMEOUT:g} s)")
    except OSError as error:
        raise _unwritable(file, error) from error
    raise InputError(
        f"{file.name} can't be downloaded: {'; '.join(failures)}. Get the file by hand and give "
        f"its path, or put it in {file.parent}"
    )


def _part_file(url: str, file: Path) -> Path:
    """Where the bytes from this address wait; files of mirrors may differ, so each has its own."""
    return file.with_name(f"{file.name}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part")


def _continue_while_it_grows(url: str, part: Path) -> None:
    """Download until complete; a broken connection is taken up again if it brought something."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=console, transient=True) as progress:
        bar = progress.add_task(part.name.split(".hdf5")[0])
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                return _append(
                    url, part, lambda done, total: progress.update(bar, completed=done, total=total)
                )
            except (http.client.HTTPException, ConnectionError, TimeoutError):
                if not part.exists() or part.stat().st_size <= before:
                    raise


def _append(url: str, part: Path, report: Callable[[int, int | None], None]) -> None:
    """Append to `part` what it lacks; ConnectionError where less comes than the server said."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return
        part.unlink()
        raise ConnectionError(
            "the interrupted download doesn't fit the file; start again"
        ) from None
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        done = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else done + int(length)
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                report(done, total)
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"{part.stat().st_size} of {total} bytes came")


def fetch_minari(dataset_id: str) -> minari.MinariDataset:
    """The Minari data set of this id, downloaded unless it is on this machine.

    What another process downloads or collects is waited for.
    """
    data = get_dataset_path(dataset_id) / "data"
    lock = data_set_lock(get_dataset_path(), dataset_id)
    if not data.exists() or lock.exists():  # who downloads makes the folder first
        with _held_where_writable(lock, f"downloads {dataset_id}"):
            if not data.exists():
                _download_minari(dataset_id)
    return minari.load_dataset(dataset_id)


def _held_where_writable(lock: Path, work: str) -> AbstractContextManager[Any]:
    """The lock, held; nothing in a folder that can't be written, where nobody downloads."""
    try:
        return held_lock(lock, work)
    except OSError:
        return nullcontext()


def _download_minari(dataset_id: str) -> None:
    local = ", ".join(minari.list_local_datasets()) or "none"
    cure = f"data sets on this machine: {local}; `minari list remote` shows what can be downloaded"
    try:
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            raise ConnectionError("HF_HUB_OFFLINE=1")
        if not os.environ.get("MINARI_REMOTE"):
            _answers(MINARI_HOST)  # Minari itself tries for half a minute
        minari.download_dataset(dataset_id)
    except Exception as error:  # the hub's client raises its own kinds, which change with versions
        raise InputError(f"Minari data set can't be downloaded ({error}); {cure}") from error


def _answers(url: str) -> None:
    """URLError unless the host answers, whatever it says."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        return
