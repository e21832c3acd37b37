"""The command `rtb-rl`.

A program is a file of rtb_rl.agents or rtb_rl.benchmarks with `Settings`, a frozen dataclass whose
fields are the options, and `main(settings)`. What a command needs is imported when it is parsed, so
that the others start fast.
"""

import ast
import difflib
import importlib
import json
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import tyro

from rtb_rl.errors import CheckpointError, InputError, NonFiniteError

USAGE = """\
usage: rtb-rl COMMAND ...

  list                  programs, benchmarks, recipes for data and D4RL tasks
  run PROGRAM ...       run a program: one complete training job
  evaluate DIR ...      episodes with the policy of a finished run
  export RUN ...        the policy of a finished run as one ONNX or torch.export file
  infill DIR ...        texts for a gap from a finished run of rtb_language
  collect RECIPE ...    make a data set with the behaviour policies in the package
  bench NAME ...        run a benchmark

The options: rtb-rl run PROGRAM --help, rtb-rl evaluate --help, and so on.
"""
COMMANDS = ("list", "run", "evaluate", "export", "infill", "collect", "bench")
FOLDERS = {"run": "rtb_rl.agents", "bench": "rtb_rl.benchmarks"}
HELP = ("-h", "--help")


@dataclass(frozen=True)
class List:
    """Print the names of programs, benchmarks, recipes for data and D4RL tasks."""


@dataclass(frozen=True)
class Evaluate:
    """Run whole episodes with the policy of a finished run; print returns and scores."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """What the program was given as --out."""
    episodes: int = 20
    seed: int = 0
    """Seed of the environments and of the policy's noise."""
    method: str | None = None
    """prior, iql, best_of_n or rtb; the program's own where none is given."""
    video: Path | None = None
    """Also film an episode, that of --episodes 1, into this .gif (or .mp4 with imageio-ffmpeg)."""
    json: bool = False
    """Print one JSON object with every episode."""


@dataclass(frozen=True)
class Infill:
    """Fill the gap between two texts."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """What rtb_language was given as --out."""
    left: str
    """The text before the gap."""
    right: str = ""
    """The text after it."""
    n: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 5
    """How many texts."""
    length: int | None = None
    """Of the gap, in tokens; not given: drawn from those of the stories trained on."""
    seed: int = 0
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class Collect:
    """Roll the behaviour policies of the package out into a Minari data set on this machine."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """ENVIRONMENT-LEVEL, such as hopper-medium-replay."""
    steps: int = 100_000
    """Environment steps, exactly."""
    seed: int = 0
    dataset_id: str | None = None
    """Minari id; local/ENVIRONMENT/LEVEL-v0 where none is given."""
    overwrite: bool = False
    """Replace a data set of this id that was made in another way."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 2 for a mistake in the input, 130 interrupted."""
    try:
        parse(sys.argv[1:] if arguments is None else arguments)()
    except (InputError, CheckpointError, NonFiniteError) as error:
        print("rtb-rl: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rtb-rl: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # what reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def parse(arguments: Sequence[str]) -> Callable[[], None]:
    """What the command line asks for, checked and ready to be called."""
    command, *rest = arguments or HELP
    match command:
        case "-h" | "--help":
            return partial(print, USAGE, end="")
        case "run" | "bench":
            return parse_program(command, rest)
        case "list":
            read_options(List, command, rest)
            return show_names
        case "evaluate":
            return partial(evaluate, read_options(Evaluate, command, rest))
        case "export":
            from rtb_rl.rl.export.command import Export, export

            return partial(export, read_options(Export, command, rest))
        case "infill":
            return partial(infill, read_options(Infill, command, rest))
        case "collect":
            return partial(collect, read_options(Collect, command, rest))
    raise unknown("command", command, COMMANDS)


def parse_program(command: str, arguments: Sequence[str]) -> Callable[[], None]:
    """`main` of the program named first, bound to the settings that the other words give."""
    names = programs(FOLDERS[command])
    name, *rest = arguments or HELP
    if name in HELP:
        return partial(print, f"usage: rtb-rl {command} NAME ...\n\n{described(names)}")
    if name not in names:
        raise unknown("program" if command == "run" else "benchmark", name, names)
    try:
        module = importlib.import_module(f"{FOLDERS[command]}.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "rtb_rl").partition(".")[0] == "rtb_rl":
            raise
        hint = "which is not installed; install rtb-rl with the extra that has it"
        raise InputError(f"{name} needs {error.name}, {hint}") from error
    return partial(module.main, read_options(module.Settings, f"{command} {name}", rest))


def read_options(settings: Any, command: str, arguments: Sequence[str]) -> Any:
    """An instance of the dataclass `settings`; wrong options end the process with status 2."""
    settings = tyro.conf.FlagCreatePairsOff[settings]
    return tyro.cli(settings, prog=f"rtb-rl {command}", args=arguments)


def unknown(kind: str, name: str, names: Collection[str]) -> InputError:
    """The error for a name that is none of `names`: it gives the nearest ones, or all."""
    near = difflib.get_close_matches(name, names, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
    return InputError(f"there is no {kind} {name!r}; {hint}")


def programs(package: str) -> dict[str, str]:
    """Name -> first line of the docstring of each program of a package; none is imported."""
    folder = Path(str(importlib.import_module(package).__file__)).parent
    found = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.ClassDef) and node.name == "Settings" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def described(names: dict[str, str]) -> str:
    """One line for each name."""
    width = max(map(len, names), default=0)
    return "\n".join(f"  {name:{width}}  {text}" for name, text in names.items())


def show_names() -> None:
    """Print what can be named on the command line."""
    from rtb_rl.rl.catalogue import D4RL_TASKS
    from rtb_rl.rl.data.behaviour import BEHAVIOURS_PATH
    from rtb_rl.rl.data.collect import LEVELS

    print("programs: rtb-rl run NAME", described(programs(FOLDERS["run"])), sep="\n")
    print("\nbenchmarks: rtb-rl bench NAME", described(programs(FOLDERS["bench"])), sep="\n")
    print("\nrecipes for data: rtb-rl collect NAME")
    for name in sorted(path.stem for path in BEHAVIOURS_PATH.glob("*.safetensors")):
        print(" ", *(f"{name}-{level}" for level in LEVELS))
    print("\nD4RL tasks: rtb-rl run PROGRAM --dataset NAME")
    wrapper = textwrap.TextWrapper(100, "  ", "    ", break_on_hyphens=False)
    for _, names in groupby(D4RL_TASKS, key=lambda name: name.partition("-")[0]):
        print(wrapper.fill(" ".join(names)))


def evaluate(settings: Evaluate) -> None:
    """Evaluate the policy of a run directory and print its returns."""
    from rtb_rl.rl import evaluate as run_episodes
    from rtb_rl.rl import load_policy, record_episode

    policy = load_policy(settings.directory, settings.method)
    if policy.env_id is None:
        raise InputError(f"{settings.directory} names no environment; run it with --env-id")
    records = run_episodes(policy, policy.env_id, episodes=settings.episodes, seed=settings.seed)
    report = {"env_id": policy.env_id, "seed": settings.seed}
    report |= records.summary(policy.reference_returns)
    if settings.video is not None:
        record_episode(policy, policy.env_id, settings.video, seed=settings.seed)
    if settings.json:
        print(json.dumps(report))
        return
    print(f"{len(report['returns'])} episodes in {policy.env_id}, seed {settings.seed}")
    for key in ("mean_return", "normalised_score"):
        if (value := report[key]) is not None:
            interval = report[f"{key}_interval"]
            spread = f"  95 % interval {interval[0]:.1f} to {interval[1]:.1f}" if interval else ""
            print(f"{key.replace('_', ' '):17} {value:8.1f}{spread}")


def infill(settings: Infill) -> None:
    """Load a posterior of texts and print what it writes into the gap."""
    from rtb_rl.tasks.language.saved import infill_gap

    given = {name: value for name, value in vars(settings).items() if name != "json"}
    texts = infill_gap(**given)
    if settings.json:
        print(json.dumps({"left": settings.left, "infills": texts, "right": settings.right}))
        return
    for text in texts:
        print(" ".join(filter(None, (settings.left, f"[{text}]", settings.right))))


def collect(settings: Collect) -> None:
    """Collect a data set and print how to use it."""
    from rtb_rl.rl import collect as make_dataset

    dataset_id = make_dataset(**vars(settings))
    print(f"{dataset_id}   (rtb-rl run rtb_iql --dataset {dataset_id} --out DIR)")
