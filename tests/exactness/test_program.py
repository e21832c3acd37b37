"""The benchmark program: finished cases are not run again; a failed one stops no other."""

import json

import pytest
from rtb_rl.benchmarks import exactness

from rtb_rl.errors import InputError
from rtb_rl.exactness import FAST


def broken(run, effort, seed):
    raise ValueError("no rows here")


def test_cases_run_once_and_a_failed_one_is_named(tmp_path):
    (job,) = exactness.chosen(FAST, ["linear_chain"])
    rows = exactness.run_all(tmp_path, FAST, [job], 1)
    assert rows and all(row["value"] <= row["bound"] for row in rows)
    results = tmp_path / "linear_chain-0" / "results.json"
    content = json.loads(results.read_text())
    content["rows"][0]["value"] = 7.0  # what a second run of the case would not give
    results.write_text(json.dumps(content))
    failing = exactness.Job("broken", broken, 0)
    with pytest.raises(RuntimeError, match=r"1 of 2 cases failed: broken, seed 0.*no rows here"):
        exactness.run_all(tmp_path, FAST, [failing, job], 1)
    assert exactness.run_all(tmp_path, FAST, [job], 1)[0]["value"] == 7.0


def test_a_case_that_there_is_not():
    with pytest.raises(InputError, match="no case nina; the cases are nine, levels"):
        exactness.chosen(FAST, ["nina"])
