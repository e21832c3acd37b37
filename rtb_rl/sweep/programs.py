"""Programs that a grid can name: how they are found, started, and how their options are checked."""

import difflib
import importlib
import io
import os
import pkgutil
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from typing import Any, get_type_hints

import tyro

from rtb_rl.errors import InputError

PACKAGE = "rtb_rl.agents"
GIVEN_BY_RUNNER = ("dataset", "seed", "out", "stages")


def load_settings(agent: str) -> type:
    """The dataclass of a program's options, by its name for `rtb-rl run` or as package.module.

    InputError where there is none, or where it lacks an option that the runner gives.
    """
    if not isinstance(agent, str) or not agent:
        raise InputError(f"agents: the program is {agent!r}; name one, such as rtb_iql")
    if "." not in agent and agent not in (names := _names()):
        near = difflib.get_close_matches(agent, names, cutoff=0.5) or names
        raise InputError(
            f"agents: there is no program {agent!r}; there are {', '.join(near)}, or name a module "
            "of your own as package.module"
        )
    module_name = agent if "." in agent else f"{PACKAGE}.{agent}"
    try:
        settings = importlib.import_module(module_name).Settings
        options = {field.name for field in fields(settings)}
    except ModuleNotFoundError as error:
        raise InputError(
            f"agents: {agent} needs the module {error.name}, which is not installed; install it or "
            "leave that agent out"
        ) from error
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"agents: {agent} is no program; it must have a dataclass Settings ({error})"
        ) from error
    if lacking := [name for name in GIVEN_BY_RUNNER if name not in options]:
        raise InputError(
            f"agents: {agent} has no --{lacking[0]}, which every cell is given; name programs of "
            "offline RL only"
        )
    return settings


def launcher(agent: str) -> list[str]:
    """The words of a command line that start this program, without its options.

    Python's -m looks first where it is called: in a checkout it would take the folders there for
    the installed package. So it may only where this process looks there too.
    """
    command = [agent] if "." in agent else ["rtb_rl", "run", agent]
    looks_here = "" in sys.path or os.getcwd() in sys.path
    return [sys.executable, *([] if looks_here else ["-P"]), "-m", *command]


def option_words(settings: type, given: Mapping[str, Any], where: str) -> list[str]:
    """`given` as words of a command line, in the order of the options' names.

    InputError for one that the program does not have, that the runner gives itself, or whose value
    is not of its kind. `where` names the program and the place in the grid.
    """
    known = [field.name for field in fields(settings) if field.name not in GIVEN_BY_RUNNER]
    defaults = {field.name: field.default for field in fields(settings)}
    types = get_type_hints(settings)
    words: list[str] = []
    for name, value in sorted(given.items()):
        check_name(name, known, where)
        option = name.replace("_", "-")
        if (types[name] is bool) != isinstance(value, bool):
            wanted = "true or false" if types[name] is bool else "a value other than true or false"
            raise InputError(f"{where}: {name} is {value!r}; it needs {wanted}")
        if isinstance(value, bool):
            words += [] if value == defaults[name] else [f"--{'' if value else 'no-'}{option}"]
        elif isinstance(value, list):
            words += [f"--{option}", *map(str, value)]
        else:
            words.append(f"--{option}={value}")
    return words


def check_name(name: str, known: Collection[str], where: str) -> None:
    """InputError where the option of a grid is none that may be given."""
    if name in GIVEN_BY_RUNNER:
        raise InputError(f"{where}: {name} is given by the runner itself; leave it out")
    if name not in known:
        near = difflib.get_close_matches(name, known, cutoff=0.5) or sorted(known)
        raise InputError(f"{where}: the program has no option {name!r}; it has {', '.join(near)}")


def check_words(settings: type, words: Sequence[str], where: str) -> None:
    """InputError where the program would refuse this command line, or what its options say.

    What they say is told by `check` of the program's options, where they have it.
    """
    output = io.StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(output):
            options = tyro.cli(tyro.conf.FlagCreatePairsOff[settings], args=list(words))
    except SystemExit as error:
        raise InputError(f"{where}: {_first_paragraph(output.getvalue())}; correct it") from error
    if (check := getattr(options, "check", None)) is None:
        return
    try:
        check()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _first_paragraph(text: str) -> str:
    """The sentence inside the box that tyro draws around a complaint."""
    lines = [re.sub(r"[│╭╮╰╯─]", "", line).strip() for line in text.splitlines()]
    body = [line for line in lines[1:] if set(line) - {"-"}]
    sentence: list[str] = []
    for line in body:
        if sentence and re.match(r"(Got errors|Argument helptext|For full|Perhaps)", line):
            break
        sentence.append(line)
    return " ".join(sentence).rstrip(".")


def _names() -> list[str]:
    package = importlib.import_module(PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))
