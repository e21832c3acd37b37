"""Rows of extraction: each method once."""

import pytest
from rtb_rl.benchmarks.extraction import Settings, each_method_once, main, table

from rtb_rl.errors import InputError


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


def test_one_method_with_two_settings_is_two_rows_named_by_their_runs():
    """Two runs of rtb_iql at beta 3 and 6 gave one row."""
    given = [row("three", "rtb"), row("six", "rtb", kl=2.5), row("six", "prior")]
    rows = each_method_once(given)
    assert rows == given
    text = table(rows)
    assert "| rtb, three |" in text and "| rtb, six |" in text and "| prior |" in text


@pytest.mark.parametrize("given", [dict(states=0), dict(states=1), dict(draws=1)])
def test_too_few_states_or_draws_for_an_error_are_refused(given, tmp_path):
    with pytest.raises(InputError, match="is [01]; give at least 2"):
        main(Settings(runs=(tmp_path,), **given))
