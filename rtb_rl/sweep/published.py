"""Published normalised scores on D4RL's nine locomotion tasks, and where ours may stand by them.

Figures are those of the source named in each line. They were measured with gym's `*-v2` on
mujoco-py, with different numbers of seeds and episodes, and not all on the last policy; so they
stand beside runs on D4RL's own data only, each with its protocol.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rtb_rl.sweep.aggregates import Aggregates
from rtb_rl.sweep.comparison import Comparison, Row
from rtb_rl.sweep.tables import NOTHING, Cell, Table, estimate_cell

TASKS = tuple(
    f"{environment}-{level}-v2"
    for level in ("medium-expert", "medium", "medium-replay")
    for environment in ("halfcheetah", "hopper", "walker2d")
)

LAST, BEST_ONLINE, PER_TASK = (
    "last checkpoint",
    "best checkpoint by online evaluation",
    "last step, but the best of 6 to 7 guidance scales for each task",
)
RTB_PAPER = "arXiv 2405.20971, Table 4"
UNKNOWN = "checkpoint not stated there"


@dataclass(frozen=True)
class Published:
    """One line of results: `scores` in the order of TASKS, in normalised scores."""

    method: str
    source: str
    protocol: str
    scores: tuple[float, ...]

    @property
    def by_task(self) -> Mapping[str, float]:
        """D4RL task -> normalised score."""
        return dict(zip(TASKS, self.scores, strict=True))


def _line(method: str, source: str, protocol: str, scores: str) -> Published:
    return Published(method, source, protocol, tuple(map(float, scores.split())))


# fmt: off
PUBLISHED: tuple[Published, ...] = (
    _line("RTB", RTB_PAPER, "5 seeds, 10 episodes, after 150,000 steps",
          "74.93 96.71 109.52 53.70 82.76 87.29 48.11 100.40 93.57"),
    _line("BC", RTB_PAPER, UNKNOWN, "55.2 52.5 107.5 42.6 52.9 75.3 36.6 18.1 26.0"),
    _line("CQL", f"{RTB_PAPER}, from the IQL paper", UNKNOWN,
          "91.6 105.4 108.8 44.0 58.5 72.5 45.5 95.0 77.2"),
    _line("IQL", f"{RTB_PAPER}, from the IQL paper", UNKNOWN,
          "86.7 91.5 109.6 47.4 66.3 78.3 44.2 94.7 73.9"),
    _line("Diffuser", f"{RTB_PAPER}, from the QGPO paper", UNKNOWN,
          "79.8 107.2 108.4 44.2 58.5 79.7 42.2 96.8 61.2"),
    _line("DD", f"{RTB_PAPER}, from the QGPO paper", UNKNOWN,
          "90.6 111.8 108.8 49.1 79.3 82.5 39.3 100.0 75.0"),
    _line("D-QL", f"{RTB_PAPER}, from the QGPO paper's rerun", UNKNOWN,
          "96.1 110.7 109.7 50.6 82.4 85.1 47.5 100.7 94.3"),
    _line("IDQL", f"{RTB_PAPER}, from the IDQL paper", "10 seeds, 50 episodes, last; N per domain",
          "95.9 108.6 112.7 51.0 65.4 82.5 45.9 92.1 85.1"),
    _line("QGPO", f"{RTB_PAPER}, from the QGPO paper", PER_TASK,
          "93.5 108.0 110.7 54.1 98.0 86.0 47.6 96.9 84.4"),
    _line("TD3+BC", "IQL paper", UNKNOWN, "90.7 98.0 110.1 48.3 59.3 83.7 44.6 60.9 81.8"),
    _line("SfBC", "SRPO and DOSER papers", UNKNOWN,
          "92.6 108.6 109.8 45.9 57.1 77.9 37.1 86.2 65.1"),
    _line("D-QL", "D-QL paper", f"5 seeds, 10 episodes, {BEST_ONLINE}",
          "96.8 111.1 110.1 51.1 90.5 87.0 47.8 101.3 95.5"),
    _line("D-QL", "flow-rl", f"5 runs, 10 episodes, {LAST}",
          "96.0 106.9 108.7 50.7 80.4 86.7 47.4 101.0 95.7"),
    _line("IDQL", "CleanDiffuser's rerun", f"150 episodes, {LAST}",
          "91.3 110.1 110.6 51.5 70.1 88.1 46.5 99.4 89.1"),
    _line("EDP", "CleanDiffuser's rerun", f"150 episodes, {LAST}",
          "95.8 110.8 110.4 50.8 72.6 86.5 44.9 83.0 87.0"),
    _line("Diffuser", "CleanDiffuser's rerun", f"150 episodes, {LAST}",
          "90.3 107.2 107.4 43.8 89.5 79.4 36.0 91.8 58.3"),
    _line("DD", "CleanDiffuser's rerun", f"150 episodes, {LAST}",
          "88.9 110.4 108.4 45.3 98.2 79.6 42.9 99.2 75.6"),
    _line("SRPO", "SRPO paper", f"20 episodes, {LAST}",
          "92.2 100.1 114.0 60.4 95.5 84.4 51.4 101.2 84.6"),
    _line("DTQL", "DOSER paper", UNKNOWN, "92.7 109.3 110.0 57.9 99.6 89.4 50.9 100.0 88.5"),
    _line("QIPO", "QIPO paper", "8 seeds", "94.5 108.0 110.9 54.2 94.0 87.6 48.0 101.3 75.6"),
    _line("FQL", "OFQL paper's run, not FQL's authors", UNKNOWN,
          "99.8 86.2 100.5 60.1 74.5 72.7 51.1 85.4 82.1"),
    _line("OFQL", "OFQL paper", UNKNOWN, "95.2 110.2 113.0 63.8 103.6 87.4 51.2 101.9 106.2"),
    _line("ReBRAC", "ReBRAC paper", f"10 seeds not tuned on, 10 episodes, {LAST}",
          "101.1 107.0 111.6 65.6 102.0 82.5 51.0 98.1 77.3"),
    _line("DAC", "flow-rl paper", f"5 runs, {LAST}",
          "100.1 112.3 115.3 59.1 103.5 97.9 55.4 103.1 98.4"),
    _line("DOSER", "DOSER paper", f"4 seeds, {LAST}",
          "96.2 111.5 110.9 67.5 104.0 86.7 63.0 104.4 94.4"),
    _line("BDPO", "flow-rl paper", f"5 runs, 10 episodes, {LAST}",
          "108.7 111.3 115.6 71.2 100.6 93.4 58.9 101.4 95.5"),
)
# fmt: on


def published_task(row: Row) -> str | None:
    """The D4RL task whose published figures belong beside this row; None for any other data.

    It's the origin of the data that decides, and the name that D4RL gave it: a task's own name is
    free, and data collected elsewhere may be called like D4RL's.
    """
    return row["dataset"] if row["origin"] == "d4rl" and row["dataset"] in TASKS else None


def published_table(comparison: Comparison, aggregates: Aggregates) -> Table | None:
    """Ours, then the published lines, on the tasks that are D4RL's; None where none is."""
    names = {task: published_task(comparison.of(task)[0]) for task in comparison.tasks}
    shared = {task: name for task, name in names.items() if name}
    if not shared:
        return None
    rows = []
    for agent in comparison.agents:
        cells = [estimate_cell(aggregates.cells.get((task, agent))) for task in shared]
        rows.append([Cell(agent, strong=True), *cells, Cell("these runs"), Cell("last policy")])
    for line in PUBLISHED:
        cells = [Cell(f"{line.by_task[name]:.1f}") for name in shared.values()]
        rows.append([Cell(line.method), *cells, Cell(line.source), Cell(line.protocol)])
    header = ["method", *shared.values(), "source", "protocol"]
    remark = (
        "Published scores come from gym's v2 environments on mujoco-py, ours from the environments "
        "and versions in the table of data. Protocols differ: a best checkpoint chosen by online "
        "evaluation, or a setting chosen for each task, adds points that the last policy of one "
        f"setting doesn't have. {NOTHING}: not run here."
    )
    title = "Beside published results"
    return Table("published", title, header, rows, [remark])


def published_remarks(comparison: Comparison) -> list[str]:
    """Why tasks have no published figures beside them."""
    reasons: dict[str, list[str]] = {}
    for task in comparison.tasks:
        row = comparison.of(task)[0]
        if published_task(row) is None:
            reason = (
                f"the data's name there, {row['dataset']}, is none with figures"
                if row["origin"] == "d4rl"
                else f"data of origin {row['origin']!r}: it isn't D4RL's, whatever its name"
            )
            reasons.setdefault(reason, []).append(task)
    return [
        f"No published figures beside {', '.join(tasks)}: {reason}."
        for reason, tasks in reasons.items()
    ]
