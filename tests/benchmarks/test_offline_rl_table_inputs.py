"""Runs that the table of the main job can't show are refused with a sentence."""

import json

import pytest
from rtb_rl.benchmarks.offline_rl_table import rows_of

from rtb_rl.errors import InputError


@pytest.mark.parametrize(
    "posterior, reference, words",
    [
        (False, [0.0, 1.0], "has no posterior of its own; give runs of rtb_iql"),
        (True, None, "is of mine, which has no reference returns"),
    ],
)
def test_runs_without_a_posterior_or_reference_returns(tmp_path, posterior, reference, words):
    data = {"dataset": "mine", "summary": {"normalised": None}, "reference_returns": reference}
    (tmp_path / "results.json").write_text(json.dumps({"dataset": data}))
    if posterior:
        (tmp_path / "posterior").mkdir()
        (tmp_path / "posterior" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=words):
        rows_of(tmp_path)
