"""How far trained posteriors are from the exact ones: cases with bounds, their report, figures.

`mixtures`, `chains`, `discrete`, `rare` and `amortised` hold the cases; `benchmarks/exactness.py`
runs them.
"""

from rtb_rl.exactness.figures import draw_figures, read_curve
from rtb_rl.exactness.fit import FAST, FULL, Case, Effort, Row, fit_toy, found, row
from rtb_rl.exactness.report import check_mistakes, markdown, mistakes, mistakes_markdown

__all__ = [
    "FAST",
    "FULL",
    "Case",
    "Effort",
    "Row",
    "check_mistakes",
    "draw_figures",
    "fit_toy",
    "found",
    "markdown",
    "mistakes",
    "mistakes_markdown",
    "read_curve",
    "row",
]
