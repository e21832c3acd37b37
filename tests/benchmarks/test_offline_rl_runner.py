"""The runner of grids: rows once a cell, failures, locks, kills, and one real program."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rtb_rl.benchmarks import offline_rl
from tiny_grids import COUNTING, TESTS, failures_of, rows_of, write_episodes, write_grid

from rtb_rl.errors import InputError
from rtb_rl.sweep.cells import Cell
from rtb_rl.sweep.local import next_cell
from rtb_rl.sweep.locks import grid_lock, take_lock

SECONDS = 60


@pytest.fixture(autouse=True)
def programs_are_found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def make_grid(tmp_path):
    """Writes a grid of counting cells on one tiny file."""

    def make(**options):
        data = write_episodes(tmp_path / "data.hdf5")
        tasks = {name: {"dataset": data} for name in options.pop("tasks", ("a",))}
        return write_grid(tmp_path / "grid.toml", tasks=tasks, **options)

    return make


def run(grid, out, **options):
    offline_rl.main(offline_rl.Settings(grid=grid, out=out, **options))


def keys(records):
    return [(record["task"], record["agent"], record["seed"]) for record in records]


def marks(out: Path) -> list[str]:
    """Cells that ran twice at once, or again after they were finished."""
    return [str(path) for name in ("again", "overlap") for path in out.rglob(name)]


def begun(out: Path, seed: int) -> int:
    path = out / "cells" / "a" / COUNTING / f"seed{seed}" / "begun"
    return len(path.read_text().splitlines())


def test_a_grid_gives_a_row_a_cell_in_order_and_is_then_left_alone(make_grid, tmp_path, capsys):
    grid, out = make_grid(seeds=[1, 0], tasks=["b", "a"]), tmp_path / "out"
    run(grid, out, workers=1)
    expected = [("b", COUNTING, 1), ("a", COUNTING, 1), ("b", COUNTING, 0), ("a", COUNTING, 0)]
    assert keys(rows_of(out)) == expected
    text = (out / "rows.jsonl").read_bytes()
    (out / "rows.jsonl").write_bytes(text.splitlines(keepends=True)[0] + b'{"task": "a", "ag')
    capsys.readouterr()
    run(grid, out)
    said = capsys.readouterr().out
    assert "the last line was cut short (17 bytes)" in said
    assert "4 cells were finished before, 3 finished cells had no row, which is written" in said
    # only the process itself can tell its peak: a row that is made again has none
    again, before = rows_of(out), [json.loads(line) for line in text.splitlines()]
    assert all(row["peak_memory_bytes"] > 2**20 for row in before)
    assert again == [before[0], *({**row, "peak_memory_bytes": None} for row in before[1:])]
    assert not marks(out) and begun(out, 1) == 1


def test_two_workers_take_different_tasks_first():
    cells = [Cell(task, agent, 0, "data", agent) for task in "ab" for agent in ("one", "two")]
    assert next_cell(dict.fromkeys(cells[1:], 0.0), cells[:1]) is cells[2]
    assert next_cell(dict.fromkeys(cells[1:2], 0.0), cells[:1]) is cells[1]
    assert next_cell(dict.fromkeys(cells, float("inf")), []) is None


def test_a_failure_is_recorded_the_others_go_on_and_retry_runs_it_again(make_grid, tmp_path):
    broken, out = tmp_path / "broken", tmp_path / "out"
    broken.touch()
    grid = make_grid(
        agents=[COUNTING, "fake_programs.counting_too"],
        agents_settings={COUNTING: {"fail": str(broken)}},
        seeds=[0, 1],
    )
    with pytest.raises(SystemExit, match=r"2 of 4 cells failed, see .*failures.jsonl; --retry"):
        run(grid, out)
    assert {key[1] for key in keys(rows_of(out))} == {"fake_programs.counting_too"}
    failures = failures_of(out)
    assert sorted(keys(failures)) == [("a", COUNTING, 0), ("a", COUNTING, 1)]
    assert failures[0]["error"] == "RuntimeError: there is broken"
    assert "counting\nTraceback" in (out / failures[0]["log"]).read_text()
    broken.unlink()
    with pytest.raises(SystemExit, match="2 of 4 cells failed"):
        run(grid, out)
    assert begun(out, 0) == 1
    run(grid, out, retry=True)
    assert len(rows_of(out)) == 4 and failures_of(out) == []
    assert begun(out, 0) == 2 and not marks(out)


def test_nothing_is_started_where_the_grid_or_the_data_are_bad(make_grid, tmp_path):
    grid = make_grid(tasks=["a"])
    (tmp_path / "data.hdf5").write_bytes(b"")
    with pytest.raises(InputError, match="task a: .*empty"):
        run(grid, tmp_path / "out")
    assert not (tmp_path / "out" / "cells").exists()
    assert not (tmp_path / "out" / "grid.json").exists()
    with pytest.raises(InputError, match="no grid given"):
        run(None, tmp_path / "out")
    with pytest.raises(InputError, match="--workers is 0"):
        run(grid, tmp_path / "out", workers=0)


def test_a_name_that_the_grid_lacks_is_refused_before_anything_is_written(make_grid, tmp_path):
    with pytest.raises(InputError, match="typo"):
        run(make_grid(), tmp_path / "out", only=("typo",))
    assert not (tmp_path / "out" / "grid.json").exists()


def test_results_that_give_no_row_are_a_failure_of_their_cell(make_grid, tmp_path):
    grid, out = make_grid(seeds=[0, 1]), tmp_path / "out"
    results = out / "cells" / "a" / COUNTING / "seed0" / "results.json"
    results.parent.mkdir(parents=True)
    results.write_text("{}")
    for retry in (False, True):
        with pytest.raises(SystemExit, match="1 of 2 cells failed"):
            run(grid, out, retry=retry)
        assert [row["seed"] for row in rows_of(out)] == [1]
        assert "no finished run of offline RL" in failures_of(out)[0]["error"]
    shutil.rmtree(results.parent)
    run(grid, out, retry=True)
    assert [row["seed"] for row in rows_of(out)] == [1, 0] and failures_of(out) == []


def test_a_row_stands_for_its_cell_where_the_run_was_removed(make_grid, tmp_path):
    grid, out = make_grid(seeds=[0, 1]), tmp_path / "out"
    run(grid, out)
    text = (out / "rows.jsonl").read_bytes()
    shutil.rmtree(out / "cells")
    run(grid, out)
    assert (out / "rows.jsonl").read_bytes() == text and not (out / "cells").exists()
    (out / "rows.jsonl").write_bytes(text.splitlines(keepends=True)[0])
    run(grid, out)
    assert len(rows_of(out)) == 2 and len([*(out / "cells").rglob("results.json")]) == 1


def test_two_runners_in_one_directory_are_refused(make_grid, tmp_path):
    grid, out = make_grid(), tmp_path / "out"
    with grid_lock(out), pytest.raises(InputError, match=r"is being filled by process \d+ on"):
        run(grid, out)
    run(grid, out)


def test_a_cell_that_another_process_works_on_is_taken_after_it(make_grid, tmp_path):
    grid, out = make_grid(seeds=[0, 1]), tmp_path / "out"
    handle = take_lock(out / "cells" / "a" / COUNTING / "seed0" / "cell.lock")
    other = subprocess.Popen(["sleep", "3"], pass_fds=(handle,))
    os.close(handle)
    run(grid, out, workers=1)
    assert other.poll() == 0
    assert [row["seed"] for row in rows_of(out)] == [1, 0]


def runner(grid, out, *options):
    words = [sys.executable, "-m", "rtb_rl", "bench", "offline_rl", "--grid", str(grid)]
    return subprocess.Popen(
        [*words, "--out", str(out), *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def children(process) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def wait_for(condition):
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def alive(pids) -> list[int]:
    """Processes of these ids that run a cell."""
    found = []
    for pid in pids:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += [pid] if b"counting" in command else []
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_cells_end_with_the_runner_and_the_directory_goes_on(number, make_grid, tmp_path):
    grid, out = make_grid(seeds=range(2), settings={"wait": 1.0}), tmp_path / "out"
    process = runner(grid, out)
    pids = wait_for(lambda: children(process) if len(list(out.rglob("begun"))) == 2 else [])
    assert len(alive(pids)) == 2
    process.send_signal(number)
    assert process.wait() == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    wait_for(lambda: not alive(pids))
    assert not (out / "failures.jsonl").exists()
    run(grid, out)
    assert [begun(out, seed) for seed in range(2)] == [2, 2]
    assert sorted(row["seed"] for row in rows_of(out)) == [0, 1] and not marks(out)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_forty_cells_killed_again_and_again_give_every_row_once(make_grid, tmp_path):
    draw = random.Random(0)
    grid, out = make_grid(seeds=range(40), settings={"wait": 0.2}), tmp_path / "out"
    rows = out / "rows.jsonl"
    for kill in range(3):
        process = runner(grid, out, "--workers", "4", "--retry")
        enough = 8 * (kill + 1) + draw.randrange(4)
        wait_for(lambda n=enough: rows.exists() and rows.read_bytes().count(b"\n") >= n)
        pids = wait_for(lambda p=process: alive(children(p)))
        os.kill(draw.choice(pids), signal.SIGKILL)
        time.sleep(draw.random() / 2)
        pids = alive(children(process))
        process.kill()
        process.wait()
        wait_for(lambda pids=pids: not alive(pids))
        rows.write_bytes(rows.read_bytes()[: -draw.randrange(1, 200)])
    failed = failures_of(out)
    assert failed and all(record["error"].startswith("ended by SIGKILL") for record in failed)
    run(grid, out, workers=4, retry=True)
    assert sorted(row["seed"] for row in rows_of(out)) == [*range(40)]
    assert [row["returns"] for row in rows_of(out)] == [[row["seed"]] for row in rows_of(out)]
    assert failures_of(out) == [] and not marks(out)


def test_the_real_program_gives_the_row_of_its_run(tmp_path):
    data = write_episodes(tmp_path / "pendulum.hdf5", ref_min_score=-1500.0, ref_max_score=0.0)
    grid = write_grid(
        tmp_path / "grid.toml",
        agents=["iql"],
        settings={"budget": "smoke", "curve": 1},
        tasks={"pendulum": {"dataset": data, "clip-actions": True}},
    )
    run(grid, tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    results = json.loads((tmp_path / "out" / row["run"] / "results.json").read_text())
    assert row["returns"] == results["methods"]["iql"]["returns"] and len(row["returns"]) == 2
    assert row["lengths"] == [200, 200]
    assert (row["env_id"], row["origin"], row["budget"]) == ("Pendulum-v1", "file", "smoke")
    assert row["overrides"] == {"budget": "smoke", "curve": 1, "clip_actions": True}
    assert [point["step"] for point in row["curve"]] == [300]
    assert row["best"] in row["curve"] and row["beta"] is None
    assert row["reference_returns"] == [-1500.0, 0.0]
    assert row["peak_memory_bytes"] > 50 * 2**20 and set(row["timings"]) == {"critic", "iql"}
    assert list((tmp_path / "out" / "stages").glob("pendulum-*/critic-seed0-*/results.json"))
