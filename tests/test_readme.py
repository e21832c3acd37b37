"""README.md keeps its word: its Python runs, its commands parse, its `make` targets exist.

A block is left out when `<!-- skip: REASON -->` stands on the line before it.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rtb_rl import cli
from rtb_rl.errors import InputError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(
    r"^(?:<!-- skip: (?P<reason>.+) -->\n+)?```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
TARGET = re.compile(r"^([\w-]+):(?!=)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the lines of README above it, why it is left out."""

    language: str
    code: str
    lines_above: int
    reason: str | None


def blocks(text: str, language: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(text):
        above = text.count("\n", 0, match.start("code"))
        found.append(Block(match["language"], match["code"], above, match["reason"]))
    return [block for block in found if block.language == language and not block.reason]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in the bash blocks, continued lines joined, prompts dropped."""
    for block in blocks(text, "bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            words.whitespace_split = True
            command = []
            for word in [*words, ";"]:
                if set(word) <= set("();<>|&"):
                    yield command
                    command = []
                elif command or not re.match(r"\w+=", word):
                    command.append(word)


def broken_commands(text: str) -> list[str]:
    """What README asks for and the project does not have."""
    targets = set(TARGET.findall((ROOT / "Makefile").read_text()))
    broken = []
    for words in filter(None, commands(text)):
        program, *arguments = words
        if Path(program).name == "make":
            named = [word for word in arguments if "=" not in word and not word.startswith("-")]
            broken += [f"make {name}" for name in named if name not in targets]
        elif Path(program).name == "rtb-rl":
            broken += [] if parses(arguments) else [shlex.join(words)]
        elif Path(program).name.startswith("python") and arguments[0].endswith(".py"):
            broken += [] if (ROOT / arguments[0]).is_file() else [shlex.join(words)]
    return broken


def parses(arguments: list[str]) -> bool:
    """Whether the command line takes these words; nothing is run."""
    try:
        cli.parse(arguments)
    except (SystemExit, InputError) as stop:
        return isinstance(stop, SystemExit) and stop.code == 0  # --help ends with status 0
    return True


@pytest.mark.mujoco
def test_the_python_of_readme_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(README, "python"):
        code = "\n" * block.lines_above + block.code  # so that an error shows the line of README
        exec(compile(code, str(ROOT / "README.md"), "exec"), namespace)
    (printed,) = re.findall(r'prints "(exact log Z [\d.]+)"', README)
    assert printed in capsys.readouterr().out


def test_the_commands_of_readme_exist(capsys):
    assert broken_commands(README) == []


def test_the_links_of_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#:\s]+)\)", README)
    assert not [link for link in links if not (ROOT / link).exists()]


SAMPLE = """
```bash
make demo CONSTRAINTS=my.txt && make nosuch
$ .venv/bin/rtb-rl collect hopper-medium \\
    --steps 10   # a comment
rtb-rl evaluate runs/x --epsiodes 3; rtb-rl nosuch | head
SEED=1 rtb-rl evaluate runs/x --json > out.json
rtb-rl evaluate --help
python agents/nosuch.py
```
<!-- skip: a network is needed -->
```bash
make download
```
```python
print(1)
```
"""


def test_what_is_missing_is_found(capsys):
    assert broken_commands(SAMPLE) == [
        "make nosuch",
        "rtb-rl evaluate runs/x --epsiodes 3",
        "rtb-rl nosuch",
        "python agents/nosuch.py",
    ]


def test_blocks_know_their_language_and_line():
    (block,) = blocks(SAMPLE, "python")
    assert block.code == "print(1)\n"
    assert SAMPLE.splitlines()[block.lines_above] == "print(1)"
