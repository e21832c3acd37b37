"""Report of a comparison of agents: tables, figures and one HTML page of finished rows.

    rtb-rl bench offline_rl --grid GRID.toml --out DIR
    rtb-rl bench report --rows DIR/rows.jsonl --out DIR/report

Writes index.html, report.md, and each table as CSV and each figure as PNG and SVG. Failed cells are
read from the failures.jsonl beside the rows.
"""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from rtb_rl.errors import InputError
from rtb_rl.sweep.aggregates import Aggregates, aggregate, counted, headline
from rtb_rl.sweep.comparison import Comparison, read_rows
from rtb_rl.sweep.figures import Drawn, draw_figures
from rtb_rl.sweep.page import Section, page
from rtb_rl.sweep.provenance import cost_table, data_table, failure_table, run_table
from rtb_rl.sweep.published import published_remarks, published_table
from rtb_rl.sweep.tables import (
    improvement_table,
    last_best_table,
    score_table,
)

CSV = ("scores", "improvement", "last_best", "published", "costs", "data", "runs", "failures")
FIGURES = ("aggregate", "task_scores", "profiles", "improvement", "curves")


@dataclass(frozen=True)
class Settings:
    """Report of a comparison of agents."""

    rows: tuple[Path, ...] = field(default_factory=tuple)
    """Files of rows, one or more."""
    out: Path = Path("report")
    focus: str | None = None
    """Agent that the others are set against; the one of the highest interquartile mean unless
    given."""
    fast: bool = False
    """Without effect: nothing is trained here."""


def sections(
    settings: Settings, comparison: Comparison, aggregates: Aggregates, figures: dict[str, Drawn]
) -> list[Section]:
    """The parts of the report; those without content are left out."""
    published = published_table(comparison, aggregates)
    parts = [
        Section("scores", "Scores", (), [score_table(comparison, aggregates)]),
        Section(
            "aggregates",
            "Over all tasks",
            (),
            _there(improvement_table(aggregates)),
            _there(*map(figures.get, ("aggregate", "profiles", "improvement"))),
        ),
        Section(
            "figures",
            "Task by task",
            figures=_there(*map(figures.get, ("task_scores", "curves"))),
        ),
        Section(
            "last-best",
            "Last and best checkpoint",
            tables=_there(last_best_table(comparison, aggregates)),
        ),
        Section(
            "published",
            "Published results",
            published_remarks(comparison),
            _there(published),
        ),
        Section("costs", "Time and memory", tables=[cost_table(comparison)]),
        Section("provenance", "Provenance", tables=[data_table(comparison), run_table(comparison)]),
        Section(
            "failures", "Cells that failed", tables=_there(failure_table(settings.rows, comparison))
        ),
    ]
    return [part for part in parts if part.tables or part.figures or part.remarks]


def markdown(title: str, sentence: str, parts: list[Section]) -> str:
    """The report without its figures."""
    lines = [f"# {title}\n", f"{sentence}\n"]
    for part in parts:
        lines += [table.markdown() for table in part.tables]
        lines += [f"{remark}\n" for remark in part.remarks]
        lines += [f"![{figure.title}]({figure.name}.png)\n" for figure in part.figures]
    return "\n".join(lines)


def remove_report(out: Path) -> None:
    """The files of an earlier report in the directory: this one may be without some of them."""
    figures = [f"{stem}.{kind}" for stem in FIGURES for kind in ("png", "svg")]
    for name in (*figures, *(f"{stem}.csv" for stem in CSV)):
        (out / name).unlink(missing_ok=True)


def main(settings: Settings) -> None:
    """Read and check the rows; write the report."""
    if not settings.rows:
        raise InputError("no rows given; name files of finished rows with --rows")
    comparison = Comparison(tuple(read_rows(settings.rows)))
    aggregates = aggregate(comparison)
    focus = settings.focus or aggregates.leader
    if settings.focus and settings.focus not in comparison.complete:
        raise InputError(
            f"--focus is {settings.focus!r}, but the agents with runs of every task are "
            f"{', '.join(comparison.complete) or 'none'}; name one of them"
        )
    settings.out.mkdir(parents=True, exist_ok=True)
    remove_report(settings.out)
    drawn = draw_figures(settings.out, comparison, aggregates, focus)
    figures = {figure.name: figure for figure in drawn}
    parts = sections(settings, comparison, aggregates, figures)
    title = (
        f"{counted(len(comparison.agents), 'agent')} on {counted(len(comparison.tasks), 'task')}, "
        f"{counted(len(comparison.rows), 'run')}"
    )
    sentence = headline(comparison, aggregates)
    for table in (table for part in parts for table in part.tables):
        (settings.out / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8")
    (settings.out / "report.md").write_text(markdown(title, sentence, parts), encoding="utf-8")
    html = page(title, sentence, parts)
    (settings.out / "index.html").write_text(html, encoding="utf-8")
    print(f"{sentence}\n{settings.out / 'index.html'}")


def _there(*items):
    """Those that aren't None."""
    return [item for item in items if item is not None]


if __name__ == "__main__":
    main(tyro.cli(Settings))
