"""Rows of extraction: each method once."""

from rtb_rl.benchmarks.extraction import each_method_once, table


def row(run, method, **changes):
    return {
        "run": run,
        "dataset": "hopper",
        "data_sha256": "a",
        "critic": "c",
        "seed": 0,
        "method": method,
        "normalised_score": 10.0,
        "advantage": 0.5,
        "advantage_error": 0.1,
        "kl": 1.25,
        "kl_error": 0.01,
        "ess": None,
        "path_kl": None,
        **changes,
    }


def test_a_method_that_several_runs_hold_is_listed_once_by_the_first():
    rows = each_method_once([row("one", "prior"), row("one", "rtb"), row("two", "prior")])
    assert [(r["run"], r["method"]) for r in rows] == [("one", "prior"), ("one", "rtb")]
    assert "| rtb | 10.0 | 0.500 ± 0.100 | 1.25 ± 0.01 | - | - |" in table(rows)
