"""The import law, the vocabulary of core, randomness as an argument, and the limits on size.

A rule reads one file and yields what breaks it. EXAMPLES holds, for each rule, texts that it must
accept and texts that it must refuse, so that a rule which can't fail is noticed.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = {"agents", "benchmarks"}

# importer -> the rooms of rtb_rl (or single modules) that it may import, beside `errors`;
# "" is rtb_rl/__init__.py
LIBRARY = {"core", "nn", "training", "adapters", "baselines", "rl", "tasks", "exactness", "sweep"}
MAY_IMPORT = {
    "": {"core", "nn", "training", "rl"},
    "core": {"core"},
    "nn": {"nn", "core"},
    "training": {"training", "core"},
    "adapters": {"adapters", "core"},
    "baselines": {"baselines", "training", "core"},
    "rl": {"rl", "nn", "training", "core"},
    "tasks": {"tasks", "nn", "adapters", "baselines", "training", "core"},
    "exactness": {"exactness", "tasks", "nn", "baselines", "training", "core"},
    "sweep": {"sweep", "rl", "training.checkpoint"},
    "cli": {"rl", "tasks"},
    "__main__": {"cli"},
    "errors": set(),
    "agents": {"", *LIBRARY},
    "benchmarks": {"", *LIBRARY},
}
# a task -> the other tasks that it may import
TASKS_MAY_IMPORT = {"text_to_image": {"image"}}
# a part of rl -> the other parts that it may import
RL_MAY_IMPORT = {
    "catalogue": set(),
    "fitted": set(),
    "episodes": {"catalogue"},
    "data": {"catalogue", "episodes"},
    "critics": {"episodes", "data"},
    "posteriors": {"fitted", "episodes", "data", "critics"},
    "peers": {"fitted", "episodes", "data", "critics", "posteriors"},
    "seeds": {"data", "critics", "posteriors"},
    "jobs": {"catalogue", "fitted", "episodes", "data", "critics", "posteriors", "peers"},
    "export": {"fitted", "episodes", "critics", "posteriors", "peers", "jobs"},
}
MAY_IMPORT_FROM_OUTSIDE = {"core": {"torch"}, "nn": {"torch"}, "errors": set()}

NOT_IN_CORE = {"action", "prompt", "pixel", "state"}
BANNED_FILE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "manager"}
MAX_LINES, MAX_PROGRAM_LINES, MAX_FUNCTION_LINES = 260, 200, 60

SEEDS_TORCH = re.compile(r"torch\.(random\.|cuda\.)?(manual_seed|seed|set_rng_state)(_all)?")
DRAWS = re.compile(
    r"torch\.(rand|randn|randint|randperm|normal|bernoulli|multinomial|poisson)(_like)?"
    r"|torch\.nn\.init\.\w*(uniform|normal|orthogonal|sparse)\w*_"
)
DRAWING_METHOD = re.compile(
    r".*\.((log_)?normal_|uniform_|bernoulli_?|exponential_|random_|multinomial|cauchy_|geometric_"
    r"|rsample|(?<!space\.)sample)"
)
NUMPY_WITHOUT_GLOBAL = re.compile(
    r"numpy\.random\.(default_rng|Generator|SeedSequence|PCG64|Philox)"
)


@dataclass(frozen=True)
class Source:
    """One file: its path from the root of the project, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        """The part of the house that the file belongs to, a key of MAY_IMPORT."""
        inner = self.path.removeprefix("rtb_rl/").removesuffix("__init__.py").removesuffix(".py")
        return inner.partition("/")[0]

    @property
    def is_library(self) -> bool:
        return self.room not in PROGRAMS

    def imports(self) -> Iterator[tuple[str, str]]:
        """Pairs (absolute module, name taken from it or ""), wherever the import stands.

        `import rtb_rl` counts as the names that are then taken from it.
        """
        package = self.path.split("/")[:-1]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                plain = (alias for alias in node.names if ast.unparse(alias) != "rtb_rl")
                yield from ((alias.name, "") for alias in plain)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "rtb_rl":
                yield "rtb_rl", node.attr
            if isinstance(node, ast.ImportFrom):
                above = package[: len(package) + 1 - node.level] if node.level else []
                module = ".".join([*above, *filter(None, [node.module])])
                yield from ((module, alias.name) for alias in node.names)

    def calls(self) -> Iterator[tuple[ast.Call, str, bool]]:
        """(call, dotted name of what is called, whether the name begins at an import)."""
        origin = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                tops = (alias.name.partition(".")[0] for alias in node.names if not alias.asname)
                origin |= {top: top for top in tops}
                origin |= {alias.asname: alias.name for alias in node.names if alias.asname}
            if isinstance(node, ast.ImportFrom) and node.module:
                origin |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                first, dot, rest = ast.unparse(node.func).partition(".")
                yield node, origin.get(first, first) + dot + rest, first in origin


def is_module(dotted: str) -> bool:
    path = ROOT / dotted.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def import_direction(source: Source) -> Iterator[str]:
    """Rooms are imported in the direction of MAY_IMPORT only, and nothing imports a program.

    The version of the package is free.
    """
    allowed = MAY_IMPORT[source.room] | {"errors"}
    for module, name in source.imports():
        target = f"{module}.{name}" if is_module(f"{module}.{name}") else module
        top, _, inner = target.partition(".")
        if top in PROGRAMS or inner.partition(".")[0] in PROGRAMS:
            yield f"imports the program {target}"
        elif (module, name) == ("rtb_rl", "__version__"):
            continue
        elif top == "rtb_rl" and not any(f"{inner}.".startswith(f"{a}.") for a in allowed):
            yield f"imports {target}"


def task_imports(source: Source) -> Iterator[str]:
    """A task knows the others of TASKS_MAY_IMPORT only."""
    if not source.path.startswith("rtb_rl/tasks/"):
        return
    own = source.path.split("/")[2].removesuffix(".py")
    allowed = TASKS_MAY_IMPORT.get(own, set()) | {own}
    for module, name in source.imports():
        parts = f"{module}.{name}".split(".")
        if parts[:2] == ["rtb_rl", "tasks"] and parts[2] not in allowed:
            yield f"imports the task {parts[2]}"


def rl_imports(source: Source) -> Iterator[str]:
    """A part of rl knows the others of RL_MAY_IMPORT only.

    The public names of `rtb_rl.rl` come from all parts, so that no part may import one of them.
    """
    if not source.path.startswith("rtb_rl/rl/") or source.path == "rtb_rl/rl/__init__.py":
        return
    own = source.path.split("/")[2].removesuffix(".py")
    allowed = RL_MAY_IMPORT.get(own, set()) | {own}
    for module, name in source.imports():
        parts = f"{module}.{name}".split(".")
        if parts[:2] == ["rtb_rl", "rl"] and not allowed.intersection(parts[2:3]):
            yield f"imports {module}.{name}"


def outside_imports(source: Source) -> Iterator[str]:
    """Rooms in MAY_IMPORT_FROM_OUTSIDE need that and the standard library only."""
    if source.room in MAY_IMPORT_FROM_OUTSIDE:
        allowed = MAY_IMPORT_FROM_OUTSIDE[source.room] | sys.stdlib_module_names | {"rtb_rl"}
        yield from (
            f"imports {m}" for m, _ in source.imports() if m.partition(".")[0] not in allowed
        )


def public_names(source: Source) -> Iterator[str]:
    """Programs import public names of rtb_rl: no leading underscore."""
    for module, name in source.imports() if not source.is_library else ():
        parts = [*module.split("."), name]
        if parts[0] == "rtb_rl" and any(re.match("_(?!_)", part) for part in parts):
            yield f"imports the private {module}.{name}"


def words_of_core(source: Source) -> Iterator[str]:
    """No identifier of core contains a word of one modality; `state_dict` is torch's."""
    for node in ast.walk(source.tree) if source.room == "core" else ():
        texts = [] if isinstance(node, ast.Constant) else [v for _, v in ast.iter_fields(node)]
        for identifier in (text for text in texts if isinstance(text, str)):
            words = re.findall("[A-Z]?[a-z]+|[A-Z]+", identifier.replace("state_dict", ""))
            if {word.lower().removesuffix("s") for word in words} & NOT_IN_CORE:
                yield f"says {identifier}"


def no_print_in_core(source: Source) -> Iterator[str]:
    """Mathematics returns values."""
    if source.room == "core":
        yield from (
            f"line {call.lineno} prints" for call, name, _ in source.calls() if name == "print"
        )


def file_name(source: Source) -> Iterator[str]:
    """The name of a file or folder says what is inside."""
    yield from sorted(set(re.split("[/_.]", source.path.lower())) & BANNED_FILE_NAMES)


def own_generator(source: Source) -> Iterator[str]:
    """The library seeds no global generator, and draws from one that it was given.

    `torch.nn.init` inside nn/ is free: torch's layers take their first weights likewise.
    """
    for call, name, imported in source.calls() if source.is_library else ():
        draws = DRAWS.fullmatch(name) or (not imported and DRAWING_METHOD.fullmatch(name))
        free = source.room == "nn" and name.startswith("torch.nn.init.")
        given = any(keyword.arg == "generator" for keyword in call.keywords)
        without_generator = draws and not free and not given
        uses_python = imported and re.fullmatch(r"random\.(?!Random)\w+", name)
        uses_numpy = name.startswith("numpy.random.") and not NUMPY_WITHOUT_GLOBAL.match(name)
        by_the_clock = name == "numpy.random.default_rng" and not (call.args or call.keywords)
        seeds_torch = SEEDS_TORCH.fullmatch(name)
        if without_generator or uses_python or uses_numpy or by_the_clock or seeds_torch:
            yield f"line {call.lineno} calls {name}"


def size(source: Source) -> Iterator[str]:
    """Files and functions fit on few screens."""
    lines = source.text.count("\n")
    limit = MAX_PROGRAM_LINES if source.room == "agents" else MAX_LINES
    if lines > limit:
        yield f"{lines} lines, more than {limit}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{node.name} has {length} lines, more than {MAX_FUNCTION_LINES}"


# rule -> texts that it accepts, texts that it refuses; each begins with its room or its path
EXAMPLES = {
    import_direction: (
        [
            "core: from rtb_rl.errors import InputError",
            "core: from .kernels import Kernel",
            "rl: from rtb_rl.nn import x; import rtb_rl.core.x; import nn",
            "training: import rtb_rl; rtb_rl.__version__",
            "tasks: from rtb_rl.training.task import Task",
            "sweep: from rtb_rl.rl import load_dataset; from rtb_rl.training.checkpoint import x",
            "agents: from rtb_rl import Sampler; from rtb_rl.rl.jobs.saved import load_policy",
        ],
        [
            "core: import rtb_rl.nn",
            "core: from ..rl import policy",
            "rl: from rtb_rl import tasks",
            "rl: from rtb_rl import Sampler",
            "rl: import rtb_rl; rtb_rl.Sampler",
            "rl: def f(): import rtb_rl.agents.iql",
            "baselines: from rtb_rl.nn import MLP",
            "sweep: from rtb_rl.cli import parse",
            "sweep: from rtb_rl.training import Run",
            "rl: from rtb_rl.sweep.rows import Rows",
            "agents: from agents.iql import main",
            "agents: from . import iql",
        ],
    ),
    task_imports: (
        [
            "rtb_rl/tasks/text_to_image/job.py: from rtb_rl.tasks.image.report import mark",
            "rtb_rl/tasks/image/job.py: from rtb_rl.tasks.image import report",
            "rtb_rl/exactness/fit.py: from rtb_rl.tasks.toy import line",
        ],
        [
            "rtb_rl/tasks/image/job.py: from rtb_rl.tasks.language import report",
            "rtb_rl/tasks/language/job.py: import rtb_rl.tasks.image.report",
            "rtb_rl/tasks/image/job.py: from rtb_rl.tasks import text_to_image",
        ],
    ),
    rl_imports: (
        [
            "rtb_rl/rl/__init__.py: from rtb_rl.rl.jobs.saved import load_policy",
            "rtb_rl/rl/data/readers.py: from rtb_rl.rl.data import download, rows",
            "rtb_rl/rl/data/readers.py: from rtb_rl.rl import catalogue",
            "rtb_rl/rl/seeds/task.py: from rtb_rl.rl.posteriors.task import offline_rl_task",
            "rtb_rl/rl/peers/td3_bc.py: import rtb_rl.rl.fitted; import rtb_rl.core.x",
            "rtb_rl/sweep/data.py: from rtb_rl.rl import load_dataset",
        ],
        [
            "rtb_rl/rl/critics/iql.py: from rtb_rl.rl.posteriors.prior import fit_prior",
            "rtb_rl/rl/critics/iql.py: def f(): from ..peers import td3_bc",
            "rtb_rl/rl/critics/iql.py: import rtb_rl.rl.jobs.job",
            "rtb_rl/rl/jobs/job.py: from rtb_rl.rl import load_dataset",
            "rtb_rl/rl/jobs/job.py: from rtb_rl import rl",
            "rtb_rl/rl/fitted.py: from rtb_rl.rl import catalogue",
            "rtb_rl/rl/unheard_of/x.py: from rtb_rl.rl.data.rows import Rows",
        ],
    ),
    outside_imports: (
        ["core: import math, torch.nn", "rl: import gymnasium"],
        ["core: import numpy as np", "nn: from safetensors import safe_open"],
    ),
    public_names: (
        ["agents: from rtb_rl.core import x", "agents: from rtb_rl import __version__"],
        ["agents: from rtb_rl.core import _x", "agents: import rtb_rl.core._x as x"],
    ),
    words_of_core: (
        ["core: fraction = m.load_state_dict('action')", "rl: action = 1"],
        ["core: def f(num_actions): ...", "core: class PixelKernel: ...", "core: x = y.state"],
    ),
    no_print_in_core: (["rl: print(1)"], ["core: print(1)"]),
    file_name: (
        ["rtb_rl/rl/database.py: "],
        ["rtb_rl/rl/data_utils.py: ", "rtb_rl/common/iql.py: "],
    ),
    own_generator: (
        [
            "core: import torch; torch.randn(3, generator=g)",
            "nn: import torch; torch.nn.init.normal_(w)",
            "rl: from torch import nn; nn.init.zeros_(w)",
            "rl: import numpy as np; np.random.SeedSequence(1).spawn(1)",
            "rl: import numpy as np; np.random.default_rng(1)",
            "rl: env.action_space.sample()",
            "rl: random.choice(x); x.sample(3, generator=g)",
            "agents: import torch; torch.rand(3)",
        ],
        [
            "core: import torch as t; t.randn_like(x)",
            "core: x.uniform_(-1, 1)",
            "nn: import torch; torch.manual_seed(0)",
            "rl: from torch import nn; nn.init.normal_(w)",
            "rl: import numpy as np; np.random.rand()",
            "rl: import numpy as np; np.random.default_rng()",
            "rl: import random; random.choice(x)",
            "rl: law.rsample()",
        ],
    ),
    size: (
        ["rl: " + "x\n" * 260, "agents: " + "x\n" * 200, "rl: def f():\n" + "    x\n" * 59],
        ["rl: " + "x\n" * 261, "agents: " + "x\n" * 201, "rl: def f():\n" + "    x\n" * 60],
    ),
}


def example(text: str) -> Source:
    place, code = text.split(": ", 1)
    paths = {"agents": "agents/x.py", **{room: f"rtb_rl/{room}/x.py" for room in LIBRARY}}
    return Source(paths.get(place, place), code)


def project() -> list[Source]:
    folders = [ROOT / name for name in ("rtb_rl", *sorted(PROGRAMS))]
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths]


@pytest.mark.parametrize("rule", EXAMPLES, ids=lambda rule: rule.__name__)
def test_the_project_obeys(rule):
    assert not [f"{source.path}: {line}" for source in project() for line in rule(source)]


@pytest.mark.parametrize("rule", EXAMPLES, ids=lambda rule: rule.__name__)
def test_the_rule_tells_good_from_bad(rule):
    accepted, refused = EXAMPLES[rule]
    assert not [text for text in accepted if list(rule(example(text)))]
    assert not [text for text in refused if not list(rule(example(text)))]


def test_the_parts_of_rl_have_an_order():
    parts = {path.stem for path in (ROOT / "rtb_rl" / "rl").iterdir() if path.stem[0] != "_"}
    assert parts == set(RL_MAY_IMPORT)
    TopologicalSorter(RL_MAY_IMPORT).prepare()  # raises CycleError


def test_every_file_belongs_to_a_room():
    assert {source.room for source in project()} <= set(MAY_IMPORT)
    assert {"core", "nn", "training", "rl", *PROGRAMS} <= {source.room for source in project()}
