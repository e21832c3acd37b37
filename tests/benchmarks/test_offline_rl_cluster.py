"""The runner of grids on Ray clusters of two nodes on this machine, of which nodes are killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rtb_rl.benchmarks import offline_rl
from tiny_grids import COUNTING, TESTS, rows_of, write_episodes, write_grid

from rtb_rl.errors import InputError

cluster_utils = pytest.importorskip("ray.cluster_utils")
CELLS, SECONDS = 8, 90


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Programs of tests are found on every node; nothing is reported anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


@pytest.fixture
def cluster():
    """A head of one processor; nodes are added by the tests."""
    cluster = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    yield cluster
    cluster.shutdown()


@pytest.fixture
def grid(tmp_path):
    return write_grid(
        tmp_path / "grid.toml",
        seeds=range(CELLS),
        settings={"wait": 2.0},
        tasks={"a": {"dataset": write_episodes(tmp_path / "data.hdf5")}},
    )


def runner(grid, out, address):
    words = [sys.executable, "-m", "rtb_rl", "bench", "offline_rl", "--grid", str(grid)]
    return subprocess.Popen(
        [*words, "--out", str(out), "--executor", "ray", "--address", address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def begun(out: Path) -> list[int]:
    """How often each cell was begun."""
    paths = [out / "cells" / "a" / COUNTING / f"seed{seed}" / "begun" for seed in range(CELLS)]
    return [len(path.read_text().splitlines()) if path.exists() else 0 for path in paths]


def finished(out: Path) -> int:
    path = out / "rows.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def running(out: Path) -> int:
    """Cells that have begun and are not finished."""
    return sum(begun(out)) - finished(out)


def at_work() -> list[int]:
    """Processes of counting cells on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        found += [int(path.parent.name)] if words[1:3] == [b"-m", COUNTING.encode()] else []
    return found


def wait_for(condition, process=None):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)


def check_whole(out: Path) -> None:
    assert sorted(row["seed"] for row in rows_of(out)) == [*range(CELLS)]
    assert not [*out.rglob("again"), *out.rglob("overlap")]
    assert not (out / "failures.jsonl").exists()


@pytest.mark.slow
def test_a_node_that_dies_loses_nothing_and_nothing_runs_twice(cluster, grid, tmp_path):
    out = tmp_path / "out"
    node = cluster.add_node(num_cpus=2)
    process = runner(grid, out, cluster.address)
    wait_for(lambda: finished(out) >= 2 and running(out) == 3, process)
    cluster.remove_node(node, allow_graceful=False)
    assert process.wait(SECONDS) == 0, process.stderr.read()
    check_whole(out)
    assert max(begun(out)) == 2 and CELLS < sum(begun(out)) <= CELLS + 2


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(cluster, grid, tmp_path):
    out = tmp_path / "out"
    process = runner(grid, out, cluster.address)
    wait_for(lambda: finished(out) == 1 and running(out) == 1, process)
    (pid,) = at_work()
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    assert process.wait(SECONDS) == 0, process.stderr.read()
    check_whole(out)
    assert sorted(begun(out)) == [1] * (CELLS - 1) + [2]


@pytest.mark.slow
def test_a_cluster_that_goes_away_is_one_error_and_the_grid_goes_on(cluster, grid, tmp_path):
    out = tmp_path / "out"
    process = runner(grid, out, cluster.address)
    wait_for(lambda: finished(out) >= 1 and running(out) == 1, process)
    address = cluster.address
    cluster.shutdown()
    _, error = process.communicate(timeout=SECONDS)
    assert process.returncode == 2 and error.count("\n") == 1, error
    assert f"no Ray cluster at {address} " in error and "run the same command" in error
    wait_for(lambda: not at_work())
    offline_rl.main(offline_rl.Settings(grid=grid, out=out, workers=4))
    check_whole(out)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_cells_on_a_cluster_end_with_the_runner(number, cluster, grid, tmp_path):
    out = tmp_path / "out"
    process = runner(grid, out, cluster.address)
    wait_for(lambda: finished(out) >= 1 and running(out) == 1, process)
    process.send_signal(number)
    assert process.wait(SECONDS) == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    before = sum(begun(out))
    wait_for(lambda: not at_work())
    time.sleep(3)
    assert sum(begun(out)) <= before + 1
    offline_rl.main(offline_rl.Settings(grid=grid, out=out, workers=4))
    check_whole(out)


def test_a_cluster_that_is_not_there_is_said(grid, tmp_path):
    with pytest.raises(InputError, match="no Ray cluster at 127.0.0.1:1 "):
        settings = offline_rl.Settings(
            grid=grid, out=tmp_path / "out", executor="ray", address="127.0.0.1:1"
        )
        offline_rl.main(settings)


def test_the_address_and_the_executor_belong_together(grid, tmp_path):
    for options, complaint in (
        ({"executor": "ray"}, "--executor ray needs --address"),
        ({"address": "auto"}, "give --executor ray with it"),
    ):
        with pytest.raises(InputError, match=complaint):
            offline_rl.main(offline_rl.Settings(grid=grid, out=tmp_path / "out", **options))
