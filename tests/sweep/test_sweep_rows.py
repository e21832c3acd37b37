"""rows.jsonl after a kill: what was cut short is taken off and said, what is odd is refused."""

import json

import pytest
from fake_programs import counting

from rtb_rl.errors import InputError
from rtb_rl.sweep.attempt import Outcome
from rtb_rl.sweep.cells import Cell
from rtb_rl.sweep.fill import fill
from rtb_rl.sweep.rows import Failures, Rows, begun_cells, row_of

CELLS = [Cell("task", "agent", seed, "data.hdf5", "program") for seed in range(3)]


@pytest.fixture
def root(tmp_path):
    for cell in CELLS:
        out = tmp_path / cell.path
        out.mkdir(parents=True)
        counting.main({"out": str(out), "seed": str(cell.seed), "dataset": "data.hdf5"})
    return tmp_path


def filled(root):
    rows = Rows(root)
    for cell in CELLS:
        rows.add(cell)
    return (root / "rows.jsonl").read_bytes()


@pytest.mark.parametrize(
    "files, beta",
    [
        ({}, None),
        ({"amortised/config.json": {"acting_beta": 2.0}}, 2.0),
        (
            {
                "amortised/config.json": {"acting_beta": None},
                "acting/results.json": {"beta": 1.5},
            },
            1.5,
        ),
        ({"qgpo/config.json": {"energy_guidance": {"beta": 2.5}}}, 2.5),
        (
            {
                "acting/results.json": {"beta": 1.5},
                "posterior/config.json": {"posterior": {"finetune": {"beta": 3.0}}},
            },
            3.0,
        ),
    ],
)
def test_the_strength_of_a_row_is_that_at_which_its_policy_acts(root, files, beta):
    for name, content in files.items():
        path = root / CELLS[0].path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    assert row_of(CELLS[0], root)["beta"] == beta


def test_a_row_says_what_its_cell_did(root):
    text = filled(root)
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["returns"] for row in rows] == [[0.0], [1.0], [2.0]]
    assert rows[1]["run"] == "cells/task/agent/seed1"
    assert (rows[1]["method"], rows[1]["origin"], rows[1]["seed"]) == ("count", "file", 1)
    assert filled(root) == text, "a row is written once"


def test_the_peak_of_the_process_stands_in_for_one_that_is_not_in_the_results(root):
    assert Rows(root).add(CELLS[0], peak_memory_bytes=7)["peak_memory_bytes"] == 7
    path = root / CELLS[1].path / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peak_memory_bytes": 5}))
    assert Rows(root).add(CELLS[1], peak_memory_bytes=7)["peak_memory_bytes"] == 5


def test_wherever_a_kill_cuts_the_file_it_is_whole_again(root):
    whole = filled(root)
    path = root / "rows.jsonl"
    begin = len(b"\n".join(whole.split(b"\n")[:2])) + 1
    for cut in [begin + 1, (begin + len(whole)) // 2, len(whole) - 2]:
        path.write_bytes(whole[:cut])
        rows = Rows(root)
        assert rows.repaired is not None and f"({cut - begin} bytes)" in rows.repaired
        assert path.read_bytes() == whole[:begin]
        assert set(rows.rows) == {CELLS[0].key, CELLS[1].key}
        assert filled(root) == whole
    for cut in [0, begin]:
        path.write_bytes(whole[:cut])
        assert Rows(root).repaired is None
        assert filled(root) == whole


@pytest.mark.parametrize("change", [lambda text: text[:-1], lambda text: text + b"\n\n"])
def test_a_whole_last_row_is_kept_whatever_its_end(change, root):
    """One without its end was dropped: a cell whose directory was removed ran again."""
    whole = filled(root)
    (root / "rows.jsonl").write_bytes(change(whole))
    rows = Rows(root)
    assert rows.repaired is not None and set(rows.rows) == {cell.key for cell in CELLS}
    assert (root / "rows.jsonl").read_bytes() == whole
    assert Rows(root).repaired is None


def execute_none(cells, root, *, started, ended):
    assert not cells


def test_a_row_that_was_cut_is_written_again_whichever_cells_are_asked_for(root):
    whole = filled(root)
    (root / "rows.jsonl").write_bytes(whole[:-9])
    given = dict(every=CELLS, workers=1, retry=False)
    assert fill(CELLS[:1], root, execute_none, **given) == 0
    assert (root / "rows.jsonl").read_bytes() == whole


def test_failures_of_cells_that_left_the_grid_are_forgotten(root):
    filled(root)
    gone = Cell("task", "other", 0, "data.hdf5", "program")
    Failures(root).add(gone, Outcome("a bad option", 1))
    assert fill(CELLS, root, execute_none, every=CELLS, workers=1, retry=False) == 0
    assert not Failures(root).records


def test_a_cell_has_begun_by_its_row_or_its_directory(root):
    Rows(root).add(CELLS[0])
    for cell in CELLS[:2]:
        (root / cell.path / "config.json").unlink()
    assert begun_cells(root) == {CELLS[0].key, CELLS[2].key}


def test_a_last_line_of_zeros_is_taken_off(root):
    whole = filled(root)
    (root / "rows.jsonl").write_bytes(whole + bytes(20) + b"\n")
    assert Rows(root).repaired is not None
    assert (root / "rows.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("order", "complaint"),
    [((0, 1, 0), "line 3 is a second row"), ((0, None, 1), "line 2 is no row")],
)
def test_what_no_kill_can_do_is_refused(order, complaint, root):
    lines = filled(root).splitlines(keepends=True)
    text = b"".join(b"{}\n" if i is None else lines[i] for i in order)
    (root / "rows.jsonl").write_bytes(text)
    with pytest.raises(InputError, match=complaint):
        Rows(root)
    assert (root / "rows.jsonl").read_bytes() == text


def test_results_of_something_else_are_refused(root):
    (root / CELLS[0].path / "results.json").write_text("{}")
    with pytest.raises(InputError, match="no finished run of offline RL .*'dataset'"):
        Rows(root).add(CELLS[0])


def test_failures_hold_the_last_one_of_each_cell_until_it_is_finished(tmp_path):
    failures = Failures(tmp_path)
    for cell, error in zip([*CELLS[:2], CELLS[0]], ["one", "two", "three"]):
        failures.add(cell, Outcome(error, 1))
    assert [r["error"] for r in Failures(tmp_path).records.values()] == ["three", "two"]
    Failures(tmp_path).remove(CELLS[0])
    (record,) = Failures(tmp_path).records.values()
    assert record["log"] == "cells/task/agent/seed1/cell.log"
