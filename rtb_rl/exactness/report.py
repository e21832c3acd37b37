"""The rows of all cases as a table that a person reads."""

import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rtb_rl.exactness.fit import Row


def markdown(rows: Sequence[Row]) -> str:
    """One line a case: median and worst over its seeds, the bound, and how many hold it; NaN is
    worse than any number.
    """
    lines = [line("case", "runs", "median", "worst", "bound", "hold"), line(*6 * ["---"])]
    for case, group in by_case(rows).items():
        values = sorted((row["value"] for row in group), key=lambda v: (math.isnan(v), v))
        count, bound = len(values), group[0]["bound"]
        limit, hold = "", ""
        if bound is not None:
            limit = number(bound)
            hold = f"{sum(math.isfinite(v) and v <= bound for v in values)} of {count}"
        middle, worst = number(values[count // 2]), number(values[-1])
        lines.append(line(case.replace("|", "&#124;"), str(count), middle, worst, limit, hold))
    return "\n".join(lines) + "\n"


def line(*cells: str) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def by_case(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of one name together, in order of first appearance."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return cases


def number(value: float) -> str:
    return f"{value:.3g}"


def check_mistakes(root: Path, junit: Path) -> list[dict[str, Any]]:
    """The published mistakes, each put in, as the tests of a clone at `root` see them; [] without
    tests.
    """
    tests = sorted((root / "tests" / "exact").glob("test_published_mistakes*.py"))
    if not tests:
        return []
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, tests)]
    subprocess.run(command, cwd=root, capture_output=True, check=False)
    return list(mistakes(junit)) if junit.exists() else []


def mistakes(junit: Path) -> Iterator[dict[str, Any]]:
    """The tests of the published mistakes in a junit file: {row, test, mistake, replaced, caught}.

    `replaced`: what was patched to put the mistake in, once for each way; `caught`: the test passed
    with the code as it is and failed with each of them.
    """
    for case in ElementTree.parse(junit).iter("testcase"):
        name = case.get("name", "")
        if not name.startswith("test_row_"):
            continue
        properties = [(p.get("name"), p.get("value", "")) for p in case.iter("property")]
        yield {
            "row": int(name[9:11]),
            "test": name,
            "mistake": next((value for key, value in properties if key == "mistake"), ""),
            "replaced": [value for key, value in properties if key == "replaced"],
            "caught": case.find("failure") is None and case.find("error") is None,
        }


def mistakes_markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """One line a mistake."""
    lines = [line("row", "mistake", "put in at", "caught"), line(*4 * ["---"])]
    for entry in sorted(found, key=lambda entry: entry["row"]):
        places = ", ".join(f"`{place}`" for place in dict.fromkeys(entry["replaced"]))
        caught = "yes" if entry["caught"] else "NO"
        lines.append(line(str(entry["row"]), entry["mistake"], places, caught))
    return "\n".join(lines) + "\n"
