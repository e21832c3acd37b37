"""Tables of a comparison, for Markdown, CSV and HTML alike."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rtb_rl.sweep.aggregates import Aggregates, counted
from rtb_rl.sweep.comparison import Comparison, Row, scores
from rtb_rl.sweep.statistics import COVERAGE, DRAWS, Estimate, mean_score

NOTHING = "-"
ONE_SEED = "\u2020"

BEST_REMARK = (
    "The best checkpoint is chosen by online evaluation, which offline learning has no access to, "
    "and scored by the few episodes that chose it: an optimistic figure, for comparison with "
    "publications that report it. It has no interval for that reason."
)

SINGLE_REMARK = (
    f"{ONE_SEED} One of the two has a single run on some task, which isn't drawn anew: no interval "
    "where that is so on every task, else one that is too narrow, and never bold."
)


@dataclass(frozen=True)
class Cell:
    """Text of one cell and the interval that belongs to it; `strong` is printed bold."""

    text: str
    strong: bool = False
    interval: str = ""

    @property
    def markdown(self) -> str:
        """**52.1** (48.0 to 55.3)."""
        text = f"**{self.text}**" if self.strong else self.text
        return f"{text} ({self.interval})" if self.interval else text


@dataclass(frozen=True)
class Table:
    """A titled table: `rows` of cells under `header`, remarks below, `records` as raw numbers."""

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    remarks: Sequence[str] = ()
    records: Sequence[Mapping[str, Any]] = field(default_factory=list)

    def markdown(self) -> str:
        """Title, table and remarks."""
        lines = [f"## {self.title}", "", _line(self.header), "|" + " --- |" * len(self.header)]
        for row in self.rows:
            lines.append(_line([cell.markdown for cell in row]))
        return "\n".join([*lines, "", *(f"{remark}\n" for remark in self.remarks)]) + "\n"

    def csv(self) -> str:
        """The raw numbers, a line a record; the cells' texts where there are no records."""
        records = self.records or [
            dict(zip(self.header, (cell.text for cell in row), strict=True)) for row in self.rows
        ]
        file = io.StringIO()
        if records:
            writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)
        return file.getvalue()


def score_table(comparison: Comparison, aggregates: Aggregates) -> Table:
    """A row a task, a column an agent, and the interquartile mean."""
    rows = []
    for task in comparison.tasks:
        there = {a: aggregates.cells.get((task, a)) for a in comparison.agents}
        unit = "" if task in comparison.normalised_tasks else " (return)"
        cells = [
            estimate_cell(there[a], there.values(), _mark(comparison, task, a))
            for a in comparison.agents
        ]
        rows.append([Cell(task + unit), *cells])
    if aggregates.interquartile:
        every = {a: aggregates.interquartile.get(a) for a in comparison.agents}
        cells = [estimate_cell(every[a], every.values()) for a in comparison.agents]
        rows.append([Cell("interquartile mean", strong=True), *cells])
    return Table(
        "scores",
        "Scores",
        ["task", *comparison.agents],
        rows,
        _score_remarks(comparison),
        [_record(comparison, aggregates, *cell) for cell in aggregates.cells],
    )


def estimate_cell(estimate: Estimate | None, row: Any = (), mark: str = "") -> Cell:
    """Value and interval; bold: the best of the row, or an interval that holds the best's value."""
    if estimate is None:
        return Cell(NOTHING)
    digits = 1 if abs(estimate.value) < 1000 else 0
    interval = ""
    if estimate.low is not None and estimate.high is not None:
        interval = f"{estimate.low:.{digits}f} to {estimate.high:.{digits}f}"
    values = [other.value for other in row if other is not None]
    strong = len(values) > 1 and estimate.reaches(max(values))
    return Cell(f"{estimate.value:.{digits}f}{mark}", strong, interval)


def last_best_table(comparison: Comparison, aggregates: Aggregates) -> Table | None:
    """The last policy beside the best checkpoint of the learning curve; None without one."""
    rows, records = [], []
    for (task, agent), last in aggregates.cells.items():
        best = [row for row in comparison.of(task, agent) if row.get("best")]
        if not best:
            continue
        chosen = mean_score([scores(row, row["best"]["returns"]) for row in best])
        same = mean_score([scores(row) for row in best])
        share = [100 * row["best"]["step"] / row["best"]["steps"] for row in best]
        seeds = len(comparison.of(task, agent))
        texts = [f"{chosen.value:.1f}", f"{chosen.value - same.value:+.1f}"]
        texts += [f"{min(share):.0f} to {max(share):.0f} %", f"{len(best)} of {seeds}"]
        rows.append([Cell(task), Cell(agent), estimate_cell(last), *map(Cell, texts)])
        records.append(
            {"task": task, "agent": agent, "last": last.value, "best": chosen.value}
            | {"seeds_with_best": len(best), "seeds": seeds}
        )
    header = ["task", "agent", "last", "best checkpoint", "best - last", "found at", "seeds"]
    title = "Last policy and best checkpoint"
    return Table("last_best", title, header, rows, [BEST_REMARK], records) if rows else None


def improvement_table(aggregates: Aggregates) -> Table | None:
    """P(row > column) of every pair of complete agents; None with fewer than two."""
    agents = list(aggregates.interquartile)
    if len(agents) < 2:
        return None
    rows = [
        [Cell(one), *(_improvement_cell(aggregates, one, other) for other in agents)]
        for one in agents
    ]
    remark = (
        "Probability in per cent that a run of the row's agent scores above one of the column's on "
        "the same task, averaged over tasks; ties count one half. Bold: the interval excludes 50. "
        "Intervals aren't corrected for the number of pairs."
    )
    remarks = [remark, SINGLE_REMARK] if aggregates.single else [remark]
    records = [
        {"first": one, "second": other, "probability": p.value, "low": p.low, "high": p.high}
        for (one, other), p in aggregates.improvement.items()
    ]
    header = ["row above column", *agents]
    return Table("improvement", "Probability of improvement", header, rows, remarks, records)


def _improvement_cell(aggregates: Aggregates, one: str, other: str) -> Cell:
    estimate = aggregates.improvement.get((one, other))
    if estimate is None:
        return Cell("")
    mark = ONE_SEED if aggregates.single & {one, other} else ""
    if estimate.low is None or estimate.high is None:
        return Cell(f"{100 * estimate.value:.0f}{mark}")
    interval = f"{100 * estimate.low:.0f} to {100 * estimate.high:.0f}"
    strong = not mark and not estimate.low <= 0.5 <= estimate.high
    return Cell(f"{100 * estimate.value:.0f}{mark}", strong, interval)


def _line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def _mark(comparison: Comparison, task: str, agent: str) -> str:
    return ONE_SEED if len(comparison.of(task, agent)) == 1 else ""


def _record(
    comparison: Comparison, aggregates: Aggregates, task: str, agent: str
) -> dict[str, Any]:
    estimate, runs = aggregates.cells[task, agent], comparison.of(task, agent)
    normalised = task in comparison.normalised_tasks
    return {
        "task": task,
        "agent": agent,
        "unit": "normalised score" if normalised else "return",
        "mean": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "seeds": len(runs),
        "episodes": sum(len(run["returns"]) for run in runs),
    }


def _score_remarks(comparison: Comparison) -> list[str]:
    counts = [(len(runs), [len(run["returns"]) for run in runs]) for runs in _cells(comparison)]
    seeds = _range([count for count, _ in counts], "seed")
    episodes = _range([n for _, lengths in counts for n in lengths], "episode")
    covered = ", ".join(f"{100 * rate:.0f} % with {runs}" for runs, rate in COVERAGE.items())
    text = f"Mean of {seeds} a cell and {episodes} a run, of the last policy. Bold: the best, and "
    remarks = [f"{text}those whose interval holds the best's mean."]
    if any(count > 1 for count, _ in counts):
        remarks.append(
            f"With a mean its 95 % interval of a hierarchical bootstrap: {DRAWS:,} times seeds are "
            "drawn, then episodes of each. With few seeds it's optimistic: on simulated runs it "
            f"held the truth in {covered} seeds."
        )
    if any(count == 1 for count, _ in counts):
        remarks.append(f"{ONE_SEED} One seed: the interval covers its episodes alone, not seeds.")
    if raw := [task for task in comparison.tasks if task not in comparison.normalised_tasks]:
        remarks.append(
            f"No reference returns: {', '.join(raw)}. Plain returns, left out of all aggregates."
        )
    return [*remarks, *_aggregate_remarks(comparison)]


def _aggregate_remarks(comparison: Comparison) -> list[str]:
    """What the aggregates are over, and who is left out."""
    if not comparison.normalised_tasks:
        return []
    remarks = [
        f"{agent} has no run of {', '.join(tasks)}: left out of all aggregates."
        for agent, tasks in comparison.missing.items()
    ]
    sizes = {
        len(comparison.runs(t, a)) for t in comparison.normalised_tasks for a in comparison.complete
    }
    if not sizes:
        return [*remarks, "No agent has run every task: there are no aggregates."]
    text = (
        "Interquartile mean: the middle half of all runs on "
        f"{counted(len(comparison.normalised_tasks), 'task')} with reference returns"
    )
    if sizes == {1}:
        return [f"{text}; with one run a task there's no interval over runs.", *remarks]
    text += "; its interval is that of a bootstrap of runs inside each task (arXiv 2108.13264)."
    if len(sizes) > 1:
        text += " Cells differ in their number of seeds; tasks count alike."
    if 1 in sizes:
        text += " A cell of one seed adds nothing to the width of that interval."
    return [text, *remarks]


def _cells(comparison: Comparison) -> list[Sequence[Row]]:
    every = [comparison.of(t, a) for t in comparison.tasks for a in comparison.agents]
    return [rows for rows in every if rows]


def _range(values: Sequence[int], noun: str) -> str:
    low, high = min(values), max(values)
    return counted(low, noun) if low == high else f"{low} to {counted(high, noun)}"
