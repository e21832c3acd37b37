"""The table counts what holds, and the list of mistakes is read from the tests' own report."""

import itertools
import math

import pytest

from rtb_rl.exactness import markdown, mistakes, mistakes_markdown, row

JUNIT = """<testsuites><testsuite>
<testcase name="test_row_07_minus_the_mean"><properties>
<property name="mistake" value="The mean is added." />
<property name="replaced" value="GroupMeanLogZ.forward" />
<property name="replaced" value="GroupMeanLogZ.forward" /></properties></testcase>
<testcase name="test_row_12_sum"><failure>no</failure></testcase>
<testcase name="test_every_row_has_its_test" />
</testsuite></testsuites>"""


def test_the_table_has_median_worst_and_what_holds():
    rows = [row("a |log Z|", seed, value, 0.02) for seed, value in enumerate((0.01, 0.5, 0.015))]
    rows += [row("b", 0, 3.0), row("c", 0, float("nan"), 1.0)]
    table = markdown(rows).splitlines()
    assert table[2] == "| a &#124;log Z&#124; | 3 | 0.015 | 0.5 | 0.02 | 2 of 3 |"
    assert table[3] == "| b | 1 | 3 | 3 |  |  |"
    assert table[4].endswith("| 1 | 0 of 1 |")


@pytest.mark.parametrize("values", list(itertools.permutations((0.3, math.nan, 0.1))))
def test_nan_is_the_worst_wherever_it_stands(values):
    table = markdown([row("a", seed, value, 0.2) for seed, value in enumerate(values)])
    assert table.splitlines()[2] == "| a | 3 | 0.3 | nan | 0.2 | 1 of 3 |"
    most = markdown([row("a", seed, value) for seed, value in enumerate((*values, math.nan))])
    assert most.splitlines()[2] == "| a | 4 | nan | nan |  |  |"


def test_mistakes_are_read_from_junit(tmp_path):
    (tmp_path / "report.xml").write_text(JUNIT)
    found = list(mistakes(tmp_path / "report.xml"))
    assert [(entry["row"], entry["caught"]) for entry in found] == [(7, True), (12, False)]
    table = mistakes_markdown(found)
    assert "| 7 | The mean is added. | `GroupMeanLogZ.forward` | yes |" in table
    assert "| 12 |  |  | NO |" in table
