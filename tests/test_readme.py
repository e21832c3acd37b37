"""README.md and the pages of evidence keep their word.

Their Python runs, their commands parse, their `make` targets exist, their links lead somewhere.

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
PAGES = [ROOT / "README.md", *sorted((ROOT / "benchmarks").rglob("README.md"))]
DOCUMENTS = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "DECISIONS.md"))]
BLOCK = re.compile(
    r"^(?:<!-- skip: (?P<reason>.+) -->\n+)?```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
TARGET = re.compile(r"^([\w-]+):(?!=)", re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the lines above it, why it is left out."""

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
    """What a page asks for and the project does not have."""
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


def anchors(text: str) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    found: list[str] = []
    for heading in HEADING.findall(FENCED.sub("", text)):
        kept = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{kept}-{found.count(kept)}" if kept in found else kept)
    return set(found)


def broken_links(text: str, page: Path) -> list[str]:
    """Relative links of `text`, which stands in `page`, to files or headings that are not there."""
    broken = []
    for link in LINK.findall(FENCED.sub("", text)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if "://" not in link and not target.exists():
            broken.append(link)
        elif "://" not in link and anchor:
            found = anchors(target.read_text() if name else text)
            broken += [] if anchor in found else [link]
    return broken


RUNNING = [page for page in PAGES if blocks(page.read_text(), "python")]


@pytest.mark.mujoco
@pytest.mark.parametrize("page", RUNNING, ids=name_of)
def test_the_python_of_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace = {"__name__": "__main__"}
    for block in blocks(text, "python"):
        code = "\n" * block.lines_above + block.code  # so that an error shows the page's line
        exec(compile(code, str(page), "exec"), namespace)
    said = re.findall(r'prints "(exact log Z [\d.]+)"', text)
    assert len(said) == (page == PAGES[0])
    printed = capsys.readouterr().out
    assert all(words in printed for words in said)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_page_exist(page, capsys):
    assert broken_commands(page.read_text()) == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_the_links_of_a_page_lead_somewhere(page):
    assert broken_links(page.read_text(), page) == []


def test_readme_leads_to_every_page():
    text = "".join(page.read_text() for page in PAGES[:2])
    assert not [page for page in PAGES[1:] if page.parent.name + "/README.md" not in text]


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


LINKS = """
# Is it *right*?
## Twice
## Twice
[a](#is-it-right) [b](#twice-1) [c](LICENSE) [d](https://example.org/x#y)
![e](DECISIONS.md#decisions)
[f](#twice-2) [g](nosuch.md) [h](DECISIONS.md#no-such-heading)
```bash
# Not a heading [i](nosuch.png)
```
[j](#not-a-heading-inosuchpng)
"""


def test_broken_links_are_found():
    assert broken_links(LINKS, ROOT / "README.md") == [
        "#twice-2",
        "nosuch.md",
        "DECISIONS.md#no-such-heading",
        "#not-a-heading-inosuchpng",
    ]


def test_blocks_know_their_language_and_line():
    (block,) = blocks(SAMPLE, "python")
    assert block.code == "print(1)\n"
    assert SAMPLE.splitlines()[block.lines_above] == "print(1)"
