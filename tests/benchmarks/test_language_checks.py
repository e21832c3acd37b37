"""The benchmark of language posteriors: its quick check, and names that there are not."""

import json

import pytest
import torch
from rtb_rl.benchmarks import language_checks

from rtb_rl import cli
from rtb_rl.core import MaskingSchedule
from rtb_rl.errors import InputError


def rows_of(out):
    lines = (out / "rows.jsonl").read_text().splitlines()
    return {row["case"]: row for row in map(json.loads, lines)}


def run(out, **given):
    language_checks.main(language_checks.Settings(out=out, fast=True, **given))
    return rows_of(out)


def test_a_sixth_of_the_masks_goes_in_each_step(tmp_path):
    rows = run(tmp_path / "masks", only=("masks",))
    assert len(rows) == 7
    for step in range(1, 7):
        row = rows[f"masks left after step {step} of 6"]
        assert row["value"] == pytest.approx(1 - step / 6, abs=0.02) and row["bound"] is None
    last = rows["masks left: largest error"]
    assert last["value"] < last["bound"] < 0.02
    assert run(tmp_path / "masks", only=("masks",)) == rows
    other = run(tmp_path / "other", only=("masks",), seed=1)
    assert other["masks left: largest error"]["value"] != last["value"]


def test_a_wrong_reveal_probability_is_beyond_the_bound(tmp_path, monkeypatch):
    """Half as large, but for the last step."""
    right = MaskingSchedule.reveal_probability.fget

    def half(self):
        found = right(self)
        return torch.cat([found[:2], found[2:] / 2])

    monkeypatch.setattr(MaskingSchedule, "reveal_probability", property(half))
    last = run(tmp_path / "masks", only=("masks",))["masks left: largest error"]
    assert last["value"] > 3 * last["bound"]


def test_a_check_that_there_is_not(tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="no check exakt; the checks are exact, markov, masks"):
        run(out, only=("masks", "exakt"))
    assert not out.exists()
    assert cli.main(["bench", "language_checks", "--out", str(out), "--only", "none"]) == 2
    assert "no check none; the checks are exact" in capsys.readouterr().err


@pytest.mark.slow
def test_every_check_runs_fast(tmp_path):
    rows = run(tmp_path / "all")
    names = {case.partition(",")[0].partition(" left")[0] for case in rows}
    assert names == {"exact", "markov", "masks"}
    assert rows["markov, RTB: |log Z error|"]["bound"] == 0.1
