"""Two first runs side by side: what one downloads or collects, the other waits for and takes."""

import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from filelock import FileLock, Timeout

from rtb_rl.rl import collect, load_dataset
from rtb_rl.rl.data.file_lock import held_lock

DATA = bytes(range(256)) * 2000
SECONDS = 60
FETCHER = """
import sys
from pathlib import Path
from rtb_rl.rl.data import download
download.fetch([sys.argv[1]], Path(sys.argv[2]))
"""
COLLECTOR = """
import sys, time
from pathlib import Path
from rtb_rl.rl.data import collect
folder, name, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
episodes = collect._episodes

def slow(*arguments):
    with open(folder / "begun", "a") as file:
        file.write("x")
    while not (folder / "go").exists():
        time.sleep(0.02)
    return episodes(*arguments)

collect._episodes = slow
collect.collect("hopper-random", steps=steps, seed=0, dataset_id=name, datasets_path=folder)
"""
DOWNLOADER = """
import os, shutil, sys, time
from pathlib import Path
from rtb_rl.rl.data import download
folder, source = Path(sys.argv[1]), Path(sys.argv[2])
os.environ.update(MINARI_DATASETS_PATH=str(folder), MINARI_REMOTE="nowhere", HF_HUB_OFFLINE="0")

def slow(name):
    shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.hdf5"))
    with open(folder / "begun", "a") as file:
        file.write("x")
    while not (folder / "go").exists():
        time.sleep(0.02)
    shutil.copytree(source, folder / name, dirs_exist_ok=True)

download.minari.download_dataset = slow
assert len(download.fetch_minari("far/hopper-v0")) > 0
"""


class Process:
    """A program that runs beside the test; its standard error goes to a file."""

    def __init__(self, folder, name, program, *arguments):
        self.log = folder / f"{name}.log"
        command = [sys.executable, "-c", program, *map(str, arguments)]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(command, stderr=file)

    @property
    def told(self):
        return self.log.read_text()

    def ends_well(self):
        assert self.process.wait(SECONDS) == 0, self.told


def wait_until(what):
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def side_by_side(tmp_path, begun, go, *programs):
    """Run both, the second from where the first is in the middle of its work until it waits."""
    first = Process(tmp_path, "first", *programs[0])
    wait_until(lambda: begun() == 1 or first.process.poll() is not None)
    second = Process(tmp_path, "second", *programs[1])
    wait_until(
        lambda: "waiting" in second.told or begun() == 2 or second.process.poll() is not None
    )
    go()
    first.ends_well()
    second.ends_well()
    return second.told


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def marks(folder):
    file = folder / "begun"
    return len(file.read_text()) if file.exists() else 0


def test_a_file_is_downloaded_by_one_and_taken_by_the_other(tmp_path, folder):
    asked, released = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers.get("Range"))
            self.send_response(200)
            self.send_header("Content-Length", str(len(DATA)))
            self.end_headers()
            self.wfile.write(DATA[:1000])
            released.wait(SECONDS)
            self.wfile.write(DATA[1000:])

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    try:
        file = folder / "hopper.hdf5"
        program = (FETCHER, f"http://127.0.0.1:{server.server_port}/x", file)
        told = side_by_side(tmp_path, lambda: len(asked), released.set, program, program)
    finally:
        released.set()
        server.shutdown()
        thread.join()
        server.server_close()
    assert file.read_bytes() == DATA
    assert asked == [None]
    assert "waiting for the run that downloads hopper.hdf5" in told
    assert not list(folder.glob("*.part"))


@pytest.mark.mujoco
def test_a_data_set_is_collected_by_one_and_kept_by_the_other(tmp_path, folder):
    program = (COLLECTOR, folder, "local/hopper/x-v0", 50)
    go = (folder / "go").touch
    told = side_by_side(tmp_path, lambda: marks(folder), go, program, program)
    assert marks(folder) == 1
    assert "waiting for the run that collects local/hopper/x-v0" in told
    assert "was made with the same settings; kept" in told.replace("\n", " ")
    assert len(load_dataset(folder / "local/hopper/x-v0")) == 50


@pytest.mark.mujoco
def test_two_data_sets_of_one_new_namespace_are_collected_at_once(tmp_path, folder):
    programs = [(COLLECTOR, folder, f"local/hopper/{name}-v0", 50) for name in "xy"]
    side_by_side(tmp_path, lambda: marks(folder), (folder / "go").touch, *programs)
    assert marks(folder) == 2
    for name in "xy":
        assert len(load_dataset(folder / f"local/hopper/{name}-v0")) == 50


@pytest.mark.mujoco
def test_who_finds_a_namespace_made_meanwhile_goes_on(folder, monkeypatch):
    from rtb_rl.rl.data import collect as module

    monkeypatch.setattr(module, "list_local_namespaces", lambda: [])
    (folder / "local/hopper").mkdir(parents=True)
    (folder / "local/hopper/namespace_metadata.json").write_text("{}")
    (folder / "local/namespace_metadata.json").write_text("{}")
    collect("hopper-random", steps=20, seed=0, datasets_path=folder)
    assert len(load_dataset(folder / "local/hopper/random-v0")) == 20


@pytest.mark.mujoco
def test_a_minari_data_set_is_downloaded_by_one_and_read_whole_by_the_other(tmp_path, folder):
    collect("hopper-random", steps=50, seed=0, dataset_id="far/hopper-v0", datasets_path=tmp_path)
    program = (DOWNLOADER, folder, tmp_path / "far/hopper-v0")
    go = (folder / "go").touch
    told = side_by_side(tmp_path, lambda: marks(folder), go, program, program)
    assert marks(folder) == 1
    assert "waiting for the run that downloads far/hopper-v0" in told


@pytest.mark.mujoco
def test_a_data_set_in_a_folder_that_cannot_be_written_is_read_without_a_lock(
    tmp_path, folder, monkeypatch
):
    from rtb_rl.rl.data import download, file_lock

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    collect("hopper-random", steps=20, seed=0, dataset_id="far/hopper-v0")
    (folder / ".far_hopper-v0.lock").touch()
    monkeypatch.setattr(file_lock, "FileLock", refuse)
    assert len(download.fetch_minari("far/hopper-v0")) > 0
    assert collect("hopper-random", steps=20, seed=0, dataset_id="far/hopper-v0")
    shutil.rmtree(folder / "far")


def test_a_lock_is_free_after_its_work_though_it_is_still_known(tmp_path):
    held = held_lock(tmp_path / "lock", "works")
    with held, pytest.raises(Timeout):
        FileLock(tmp_path / "lock").acquire(timeout=0)
    with FileLock(tmp_path / "lock").acquire(timeout=0):
        assert held is not None
