"""One table in two forms: what a cell says, and that both forms have the same cells."""

import pytest

from rtb_rl.training.table import cells, markdown, mean_over_seeds, print_table, slug

COLUMNS = {"E[x]": ("x", "x_error"), "count": ("count", None), "y": ("y", "y_error")}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"x": 0.12345, "x_error": 0.0021}, ["0.123 ± 0.002", "-", "-"]),
        ({"x": -99.9996, "x_error": None}, ["-100.000", "-", "-"]),
        ({"x": -1234.5, "x_error": 2.6}, ["-1234 ± 3", "-", "-"]),
        ({"count": 1234567, "y": 0.0}, ["-", "1234567", "0.000"]),
        ({"x": None, "x_error": 1.0, "count": 7}, ["-", "7", "-"]),
        ({}, ["-", "-", "-"]),
    ],
)
def test_what_a_cell_says(row, expected):
    assert cells(COLUMNS, row) == expected


def test_the_markdown_has_a_line_for_each_row_in_their_order():
    rows = {"second best": {"x": 1.0, "x_error": 0.5}, "best": {"count": 3, "y": 2.0}}
    assert markdown(COLUMNS, rows).splitlines() == [
        "| method | E[x] | count | y |",
        "| --- | --- | --- | --- |",
        "| second best | 1.000 ± 0.500 | - | - |",
        "| best | - | 3 | 2.000 |",
    ]


def test_the_console_shows_the_same_cells(capsys):
    """Also a title in square brackets, which is not a style."""
    print_table("a title", COLUMNS, {"best": {"x": 1.0, "x_error": 0.5, "count": 3}})
    shown = capsys.readouterr().out
    for text in ("a title", "E[x]", "best", "1.000 ± 0.500", "│     3 │"):
        assert text in shown, shown


def test_names_of_files():
    assert slug("DPOK, KL weight 1/beta") == "DPOK_KL_weight_1_beta"
    assert slug("best of N") == "best_of_N"


def test_seeds_have_an_error_where_the_draws_of_one_have_none():
    rows = [{"tv": value, "tv_error": None, "reference_tv_error": None} for value in (0.1, 0.3)]
    found = mean_over_seeds(rows)
    assert found["tv"] == pytest.approx(0.2) and found["tv_error"] == pytest.approx(0.1)
    assert found["reference_tv_error"] is None
