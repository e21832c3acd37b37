"""Tables, figures and the page of synthetic rows; the program from end to end."""

import csv
import io
import re
from html.parser import HTMLParser

import pytest
from rtb_rl.benchmarks import report
from synthetic_rows import grid, row, write

from rtb_rl.errors import InputError
from rtb_rl.sweep.aggregates import aggregate
from rtb_rl.sweep.comparison import Comparison
from rtb_rl.sweep.drawing import COLOURS, looks
from rtb_rl.sweep.figures import curve_points, draw_curves, draw_figures
from rtb_rl.sweep.page import Section, inlined, page
from rtb_rl.sweep.provenance import cost_table, data_table, failure_table, run_table
from rtb_rl.sweep.published import PUBLISHED, TASKS, published_remarks, published_table
from rtb_rl.sweep.tables import Cell, Table, last_best_table, score_table

NASTY = "<script>alert('x')</script>&\"|$a_b$"
VOID = {"meta", "link", "br", "hr", "img"}


def point(step, *scores):
    return {"step": step, "steps": 10, "returns": row(scores=scores)["returns"]}


def tables_of(rows):
    comparison = Comparison(tuple(rows))
    return comparison, aggregate(comparison)


def texts(table):
    return [[cell.text for cell in each] for each in table.rows]


def test_scores_are_bold_where_the_interval_reaches_the_best():
    rows = [row("best", seed=s, scores=(80 + s, 80 - s)) for s in (0, 1, 2)]
    rows += [row("close", seed=s, scores=(70 + 8 * s, 70 + 8 * s)) for s in (0, 1, 2)]
    rows += [row("far", seed=s, scores=(10 + s, 10 + s)) for s in (0, 1, 2)]
    first, mean = score_table(*tables_of(rows)).rows
    assert [(cell.text, cell.strong) for cell in first[1:]] == [
        ("80.0", True),
        ("78.0", True),
        ("11.0", False),
    ]
    assert mean[0].text == "interquartile mean" and first[2].interval == "70.0 to 86.0"


def test_scores_say_who_is_left_out_and_what_is_no_score():
    rows = grid({("a", "x"): 80, ("a", "y"): 40, ("b", "x"): 70})
    rows += [row("x", "raw", returns=[5.0, 6.0], reference_returns=None)]
    table = score_table(*tables_of(rows))
    remarks = " ".join(table.remarks)
    assert "y has no run of b: left out of all aggregates" in remarks
    assert "No reference returns: raw." in remarks and "One seed" in remarks
    assert texts(table)[1][2] == "-" and texts(table)[-1][2] == "-"
    assert table.rows[2][0].text == "raw (return)" and table.rows[2][1].text == "5.5\u2020"


def test_one_seed_a_cell_claims_no_interval_over_seeds(tmp_path):
    comparison, found = tables_of([row("x", "a"), row("y", "a"), row("x", "b"), row("y", "b")])
    remarks = " ".join(score_table(comparison, found).remarks)
    assert "no interval over runs" in remarks and "seeds are drawn" not in remarks
    captions = [f.caption for f in draw_figures(tmp_path, comparison, found, "x")]
    assert len(captions) == 4 and [c for c in captions if "95 %" in c] == [
        "Small points: one seed each, its mean over episodes. Above: mean and 95 % interval."
    ]


def test_csv_holds_raw_numbers():
    rows = grid({("a", "x"): 80, ("a", "y"): 40}, seeds=3, episodes=4)
    comparison, found = tables_of(rows)
    records = list(csv.DictReader(io.StringIO(score_table(comparison, found).csv())))
    assert [(r["task"], r["agent"], r["seeds"], r["episodes"]) for r in records] == [
        ("a", "x", "3", "12"),
        ("a", "y", "3", "12"),
    ]
    assert float(records[0]["mean"]) == found.cells["a", "x"].value


def test_markdown_keeps_a_bar_in_a_name_inside_its_cell():
    table = Table("t", "T", ["a|b", "c"], [[Cell("x\ny", True), Cell("1", interval="0 to 2")]])
    assert table.markdown().splitlines()[2:5] == [
        "| a\\|b | c |",
        "| --- | --- |",
        "| **x y** | 1 (0 to 2) |",
    ]


def test_best_checkpoint_stands_beside_the_last_policy_with_its_remark():
    rows = [
        row(seed=s, scores=(50.0, 50.0), best=point(4, 60.0, 70.0), curve=[point(4, 60.0, 70.0)])
        for s in (0, 1)
    ]
    table = last_best_table(*tables_of([*rows, row(seed=2, scores=(80.0,))]))
    # the difference is over the seeds that have both
    assert texts(table) == [["hopper", "iql", "60.0", "65.0", "+15.0", "40 to 40 %", "2 of 3"]]
    assert "chosen by online evaluation" in table.remarks[0]
    assert last_best_table(*tables_of([row()])) is None


def test_costs_and_provenance():
    rows = [row(seed=0), row(seed=1, wall_seconds=7200.0, peak_memory_bytes=2**30)]
    comparison, _ = tables_of(rows)
    assert texts(cost_table(comparison)) == [
        ["hopper", "iql", "40 s to 2 h 00 min", "90 s", "critic 60 s, policy 30 s", "1.00 GiB"]
    ]
    assert texts(data_table(comparison))[0][:8] == [
        "hopper", "hopper", "file", "ab" * 6, "Hopper-v4", "-20.2723, 3234.3", "3.3.0", "1.2.0"
    ]  # fmt: skip
    assert texts(run_table(comparison)) == [
        ["hopper", "iql", "iql", "0, 1", "2", "demo", "-", "-", "0123456789", "2026-01-02"]
    ]


def test_rows_without_costs_have_dashes():
    bare = row(timings=None, wall_seconds=None, peak_memory_bytes=None, versions=None, commit=None)
    comparison, _ = tables_of([bare])
    assert texts(cost_table(comparison))[0][2:] == ["-"] * 4
    assert texts(data_table(comparison))[0][6:] == ["-"] * 4


def test_a_file_called_like_a_d4rl_task_has_no_published_figures():
    for name in ("hopper-medium-replay", "hopper-medium-replay-v2"):
        for origin in ("file", "local", "minari"):
            comparison, found = tables_of([row(task=name, dataset=name, origin=origin)])
            assert published_table(comparison, found) is None
            assert f"origin '{origin}'" in published_remarks(comparison)[0]


def test_published_figures_follow_the_data_and_not_the_name_of_the_task():
    rows = [
        row(task="hopper-medium-v2", dataset="ant-medium-v2", origin="d4rl"),
        row(task="mine", dataset="hopper-medium-replay-v2", origin="d4rl"),
    ]
    comparison, found = tables_of(rows)
    table = published_table(comparison, found)
    assert table.header == ["method", "hopper-medium-replay-v2", "source", "protocol"]
    assert ["RTB", "100.4", "arXiv 2405.20971, Table 4"] in [line[:3] for line in texts(table)]
    assert texts(table)[0][:2] == ["iql", "55.0"]
    assert "ant-medium-v2" in published_remarks(comparison)[0]


@pytest.mark.parametrize(
    "method, source, average",
    [
        ("RTB", "2405.20971", 83.0),
        ("BC", "2405.20971", 51.9),
        ("CQL", "2405.20971", 77.6),
        ("IQL", "2405.20971", 77.0),
        ("Diffuser", "2405.20971", 75.3),
        ("DD", "2405.20971", 81.8),
        ("D-QL", "2405.20971", 86.3),
        ("IDQL", "2405.20971", 82.1),
        ("QGPO", "2405.20971", 86.6),
        ("TD3+BC", "IQL paper", 75.3),
        ("SfBC", "SRPO", 75.6),
        ("D-QL", "D-QL paper", 88.0),
        ("D-QL", "flow-rl", 85.9),
        ("IDQL", "CleanDiffuser", 84.1),
        ("EDP", "CleanDiffuser", 82.4),
        ("Diffuser", "CleanDiffuser", 78.2),
        ("DD", "CleanDiffuser", 83.2),
        ("SRPO", "SRPO paper", 87.1),
        ("DTQL", "DOSER", 88.7),
        ("QIPO", "QIPO", 86.0),
        ("FQL", "OFQL", 79.2),
        ("OFQL", "OFQL", 92.5),
        ("ReBRAC", "ReBRAC", 88.5),
        ("DAC", "flow-rl", 93.9),
        ("DOSER", "DOSER", 93.2),
        ("BDPO", "flow-rl", 95.2),
    ],
)
def test_published_lines_have_their_published_average(method, source, average):
    (line,) = [p for p in PUBLISHED if p.method == method and source in p.source]
    assert sum(line.scores) / len(TASKS) == pytest.approx(average, abs=0.1)
    assert line.protocol and len(line.scores) == 9


def test_curves_hold_the_steps_that_all_seeds_have():
    rows = [
        row(seed=0, curve=[point(2, 10.0), point(5, 20.0), point(10, 30.0)]),
        row(seed=1, curve=[point(5, 40.0), point(10, 50.0)]),
        row(seed=2),
    ]
    points = [(share, estimate.value) for share, estimate in curve_points(rows)]
    assert points == [(50.0, pytest.approx(30.0)), (100.0, pytest.approx(40.0))]
    assert list(curve_points([row()])) == []


def test_every_agent_has_a_look_of_its_own():
    names = [f"agent{i}" for i in range(20)]
    assert len({(k.colour, k.marker, k.line) for k in looks(names).values()}) == 20
    assert len(set(COLOURS)) == len(COLOURS)


def test_figures_are_those_that_the_rows_allow(tmp_path):
    comparison, found = tables_of([row(reference_returns=None)])
    assert [f.name for f in draw_figures(tmp_path, comparison, found, None)] == ["task_scores"]


def test_inlined_figures_share_no_ids_and_take_the_ink_of_the_page(tmp_path):
    comparison, found = tables_of(grid({("a", "x"): 80, ("a", "y"): 40}))
    drawn = draw_figures(tmp_path, comparison, found, "x")
    assert [f.name for f in drawn] == ["aggregate", "task_scores", "profiles", "improvement"]
    assert all((tmp_path / f"{f.name}.png").stat().st_size for f in drawn)
    texts = [inlined(f.svg.read_text(), f.name, f.title) for f in drawn]
    ids = [name for text in texts for name in re.findall(r'\bid="([^"]+)"', text)]
    assert len(ids) == len(set(ids)) > 20
    used = {n for text in texts for n in re.findall(r'(?:href="#|url\(#)([^")]+)', text)}
    assert used <= set(ids) and "#1b1f24" not in "".join(texts)
    assert draw_figures(tmp_path, comparison, found, "x")[0].svg.read_text() in (
        drawn[0].svg.read_text(),
    )


class Outline(HTMLParser):
    """Tags that are open, and every tag and attribute that was met."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.values, self.text = [], set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.values += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.values += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of rows with names that would break a page, and of one failed cell."""
    folder = tmp_path_factory.mktemp("report")
    curve = [point(5, 50.0, 55.0), point(10, 60.0, 66.0)]
    others = {"curve": curve, "best": curve[1], "overrides": {"note": NASTY}}
    rows = grid({("a", "x"): 80, ("a", NASTY): 40, ("b", "x"): 70, ("b", NASTY): 30}, **others)
    path = write(folder / "rows.jsonl", rows)
    write(folder / "failures.jsonl", [{"task": "b", "agent": "z", "seed": 0, "error": NASTY}])
    report.main(report.Settings((path,), folder / "out"))
    return folder / "out"


def test_the_page_is_whole_and_everything_in_it_is_escaped(written):
    outline = Outline((written / "index.html").read_text())
    assert not outline.open and "script" not in outline.tags
    assert NASTY in outline.text
    assert not [name for name, _ in outline.values if name.startswith("on")]


def test_the_page_needs_nothing_from_elsewhere(written):
    text = (written / "index.html").read_text()
    outline = Outline(text)
    assert not outline.tags & {"link", "img", "iframe", "object", "script", "image"}
    targets = [v for name, v in outline.values if name in {"href", "src", "xlink:href"}]
    assert targets and all(target.startswith("#") for target in targets)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_links_of_the_contents_lead_to_sections(written):
    outline = Outline((written / "index.html").read_text())
    ids = {value for name, value in outline.values if name == "id"}
    links = {value[1:] for name, value in outline.values if name == "href"}
    assert links <= ids
    assert {"scores", "aggregates", "last-best", "costs", "provenance", "failures"} <= links


def test_the_report_has_its_files(written):
    names = {path.name for path in written.iterdir()}
    stems = {"aggregate", "task_scores", "profiles", "improvement", "curves"}
    assert names >= {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert names >= {"index.html", "report.md", "scores.csv", "costs.csv", "failures.csv"}
    text = (written / "report.md").read_text()
    assert "x has the highest interquartile mean of 2 agents" in text
    assert "origin 'file'" in text and "published.csv" not in names


def test_a_line_keeps_its_agent_in_view_when_a_table_is_scrolled():
    """Only the first cell stays where it is, and under one task that says nothing."""
    table = Table("t", "T", ["task", "agent", "process"], [[Cell("a"), Cell("x"), Cell("1 s")]])
    text = page("T", "H", [Section("t", "T", tables=[table])])
    assert '<th scope="row">x<small>a</small></th><td>1 s</td>' in text
    assert '<th scope="col">agent, task</th><th scope="col">process</th>' in text


def test_a_legend_takes_no_height_from_the_curves(tmp_path):
    """With twenty agents it had more than half of the figure."""
    heights = {}
    for count in (2, 20):
        curve = [point(5, 50.0), point(10, 60.0)]
        rows = [row(f"an agent with a name, {n}", curve=curve) for n in range(count)]
        comparison = Comparison(tuple(rows))
        figure, _, _ = draw_curves(comparison, looks(comparison.agents))
        figure.canvas.draw()
        heights[count] = figure.axes[0].get_window_extent().height / figure.dpi
    assert heights[20] > 0.85 * heights[2]


def test_curves_without_a_common_step_are_left_out(tmp_path):
    curves = ([point(5, 50.0)], [point(6, 60.0)])
    rows = [row(seed=seed, curve=curve) for seed, curve in enumerate(curves)]
    comparison = Comparison(tuple(rows))
    drawn = draw_figures(tmp_path, comparison, aggregate(comparison), None)
    assert "curves" not in {figure.name for figure in drawn}


def test_a_page_without_figures_is_whole():
    outline = Outline(page("T", "H", []))
    assert not outline.open and "T" in outline.text


def test_failures_are_read_beside_the_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row()])
    comparison = Comparison((row(),))
    assert failure_table([path], comparison) is None
    write(tmp_path / "failures.jsonl", [])
    assert failure_table([path, path], comparison) is None
    (tmp_path / "failures.jsonl").write_text('{"task": ')
    with pytest.raises(InputError, match="line 1 is not a whole row"):
        failure_table([path], comparison)


def test_a_failure_whose_cell_has_a_row_since_is_none(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row(seed=0)])
    failed = [{"task": "hopper", "agent": "iql", "seed": n, "error": "boom"} for n in (0, 1)]
    write(tmp_path / "failures.jsonl", failed)
    table = failure_table([path], Comparison((row(seed=0),)))
    assert table is not None and [line[2].text for line in table.rows] == ["1"]


def test_a_later_report_leaves_nothing_of_an_earlier_one(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row()])
    write(tmp_path / "failures.jsonl", [{"task": "a", "agent": "z", "seed": 0, "error": "boom"}])
    report.main(report.Settings((path,), tmp_path / "out"))
    assert (tmp_path / "out" / "failures.csv").exists()
    (tmp_path / "failures.jsonl").unlink()
    report.main(report.Settings((path,), tmp_path / "out"))
    assert not (tmp_path / "out" / "failures.csv").exists()
    parts = {*report.CSV, *report.FIGURES}
    written = {p.stem for p in (tmp_path / "out").iterdir() if p.suffix in {".csv", ".png", ".svg"}}
    assert written and written <= parts


def test_mistakes_are_refused_before_anything_is_written(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row()])
    with pytest.raises(InputError, match="no rows given"):
        report.main(report.Settings(out=tmp_path / "out"))
    with pytest.raises(InputError, match="--focus is 'nobody'.*iql; name one"):
        report.main(report.Settings((path,), tmp_path / "out", focus="nobody"))
    assert not (tmp_path / "out").exists()
