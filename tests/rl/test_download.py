"""Downloads against a server on this machine that can break off, ignore ranges and lie."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from rtb_rl.errors import InputError
from rtb_rl.rl.catalogue import find_task
from rtb_rl.rl.data import download

DATA = bytes(range(256)) * 2000
DIGEST = hashlib.sha256(DATA).hexdigest()


@dataclass
class Server:
    """What the server does, and what it was asked for."""

    address: str = ""
    body: bytes = DATA
    status: int = 200
    ranges: bool = True
    break_after: list[int] = field(default_factory=list)
    """Bytes sent before the connection breaks, one entry a request; whole answers afterwards."""
    asked: list[str | None] = field(default_factory=list)


def handler_of(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            server.asked.append(wanted)
            start = int(wanted[6:-1]) if wanted and server.ranges else 0
            if server.status != 200:
                return self.send_error(server.status)
            if wanted and server.ranges and start >= len(server.body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.body)}")
                return self.end_headers()
            body = server.body[start:]
            self.send_response(206 if wanted and server.ranges else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: server.break_after.pop(0)] if server.break_after else body)

        def log_message(self, format, *args):
            pass

    return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    settings = Server()
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_of(settings))
    settings.address = f"http://127.0.0.1:{listener.server_port}/data.hdf5"
    thread = threading.Thread(target=lambda: listener.serve_forever(poll_interval=0.01))
    thread.start()
    yield settings
    listener.shutdown()
    thread.join()
    listener.server_close()


def parts(folder) -> list[int]:
    return [part.stat().st_size for part in folder.glob("*.part")]


def test_a_file_is_downloaded_once_and_its_digest_recorded(server, tmp_path):
    file = tmp_path / "deep" / "data.hdf5"
    assert download.fetch([server.address], file) == file
    assert file.read_bytes() == DATA
    assert (tmp_path / "deep" / "data.hdf5.sha256").read_text() == f"{DIGEST}  data.hdf5\n"
    download.fetch([server.address], file)
    assert server.asked == [None]
    assert parts(file.parent) == []


def test_a_broken_connection_is_taken_up_where_it_broke(server, tmp_path):
    server.break_after = [1000, 5000]
    file = download.fetch([server.address], tmp_path / "data.hdf5", sha256=DIGEST)
    assert file.read_bytes() == DATA
    assert server.asked == [None, "bytes=1000-", "bytes=6000-"]


def test_an_interrupted_download_is_resumed_by_the_next_call(server, tmp_path):
    server.break_after = [3000, 0]
    with pytest.raises(InputError, match=r"3000 of 512000 bytes came.*by hand"):
        download.fetch([server.address], tmp_path / "data.hdf5")
    assert parts(tmp_path) == [3000]
    file = download.fetch([server.address], tmp_path / "data.hdf5", sha256=DIGEST)
    assert file.read_bytes() == DATA
    assert server.asked[-1] == "bytes=3000-"


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.ranges, server.break_after = False, [3000]
    file = download.fetch([server.address], tmp_path / "data.hdf5", sha256=DIGEST)
    assert file.read_bytes() == DATA
    assert server.asked == [None, "bytes=3000-"]


def test_a_part_that_is_complete_is_used(server, tmp_path):
    part = download._part_file(server.address, tmp_path / "data.hdf5")
    part.write_bytes(DATA)
    file = download.fetch([server.address], tmp_path / "data.hdf5", sha256=DIGEST)
    assert file.read_bytes() == DATA


def test_a_part_longer_than_the_file_is_thrown_away(server, tmp_path):
    part = download._part_file(server.address, tmp_path / "data.hdf5")
    part.write_bytes(DATA + b"more")
    with pytest.raises(InputError, match="doesn't fit"):
        download.fetch([server.address], tmp_path / "data.hdf5")
    assert parts(tmp_path) == []
    assert download.fetch([server.address], tmp_path / "data.hdf5").read_bytes() == DATA


def test_a_wrong_digest_is_refused_and_the_file_removed(server, tmp_path):
    server.body = b"something else"
    with pytest.raises(InputError, match=rf"expected {DIGEST}.*removed"):
        download.fetch([server.address], tmp_path / "data.hdf5", sha256=DIGEST)
    assert [path.name for path in tmp_path.iterdir()] == ["data.hdf5.lock"]


def test_the_recorded_digest_holds_for_later_downloads_and_the_kept_file(server, tmp_path):
    file = download.fetch([server.address], tmp_path / "data.hdf5")
    file.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"data.hdf5 has SHA-256 .*delete it"):
        download.fetch([server.address], file)
    file.unlink()
    server.body = b"another release"
    with pytest.raises(InputError, match=f"expected {DIGEST}"):
        download.fetch([server.address], file)
    assert not file.exists()


def test_the_next_mirror_is_asked_where_one_fails(server, tmp_path):
    closed = "http://127.0.0.1:9/data.hdf5"
    assert download.fetch([closed, server.address], tmp_path / "data.hdf5").read_bytes() == DATA


def test_where_all_mirrors_fail_each_is_named_with_the_cure(server, tmp_path):
    server.status = 403
    closed = "http://127.0.0.1:9/data.hdf5"
    with pytest.raises(InputError) as caught:
        download.fetch([closed, server.address], tmp_path / "data.hdf5")
    message = str(caught.value)
    for words in (closed, "refused", server.address, "403", "by hand", str(tmp_path)):
        assert words in message
    assert "\n" not in message


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=r"can't keep .*D4RL_DATASET_DIR"):
        download.fetch([server.address], tmp_path / "file" / "data.hdf5")


def test_tasks_are_kept_in_d4rls_folder(server, tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    task = find_task("hopper-medium-v2")
    (tmp_path / task.file_name).write_bytes(DATA)
    assert download.fetch_task(task) == tmp_path / "hopper_medium-v2.hdf5"
    monkeypatch.delenv("D4RL_DATASET_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert download.dataset_directory() == tmp_path / "home" / ".d4rl" / "datasets"


def test_minari_is_not_asked_where_the_hub_is_off(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE=1.*on this machine: none"):
        download.fetch_minari("mujoco/hopper/medium-v0")


def test_an_unreachable_hub_is_one_line_with_the_cure(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("MINARI_REMOTE", raising=False)
    monkeypatch.setattr(download, "MINARI_HOST", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"can't be downloaded.*refused.*minari list remote"):
        download.fetch_minari("mujoco/hopper/medium-v0")
