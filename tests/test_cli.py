"""The command line: names, options, exit statuses, and one line for a mistake."""

import dataclasses
import importlib
import json
import shlex
import subprocess
import sys
import textwrap

import pytest

from rtb_rl import cli, rl
from rtb_rl.errors import CheckpointError, InputError, NonFiniteError
from rtb_rl.rl.data.behaviour import BEHAVIOURS_PATH

PROGRAMS = sorted(cli.programs("rtb_rl.agents"))
BENCHMARKS = sorted(cli.programs("rtb_rl.benchmarks"))


@pytest.fixture
def fake_programs(monkeypatch, tmp_path):
    """A package of three files in the place of rtb_rl.agents: two programs and one that is none."""
    folder = tmp_path / "fake_agents"
    folder.mkdir()
    program = '''
        """Says what it was given.

        At length.
        """
        from dataclasses import asdict, dataclass
        from pathlib import Path

        @dataclass(frozen=True)
        class Settings:
            out: Path
            seed: int = 0
            fast: bool = False

        def main(settings: Settings) -> None:
            print(asdict(settings))
    '''
    (folder / "__init__.py").write_text('"""Programs."""')
    (folder / "good.py").write_text(textwrap.dedent(program))
    (folder / "lacking.py").write_text("import no_such_package\nclass Settings: ...\n")
    (folder / "script.py").write_text("print('not a program')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.FOLDERS, "run", "fake_agents")
    yield
    for name in [name for name in sys.modules if name.startswith("fake_agents")]:
        del sys.modules[name]


def error_line(capsys) -> str:
    """The one line on stderr, without its prefix; nothing else may have been printed."""
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("rtb-rl: error: ") and output.err.count("\n") == 1
    return output.err.removeprefix("rtb-rl: error: ")


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_usage_names_every_command(arguments, capsys):
    assert cli.main(arguments) == 0
    usage = capsys.readouterr().out
    assert all(f"\n  {command} " in usage for command in cli.COMMANDS)


def test_help_loads_nothing_heavy():
    code = "import sys; from rtb_rl.cli import main; main(['--help']); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not {"gymnasium", "minari", "h5py", "matplotlib"} & set(result.stdout.split())


def test_list_names_programs_recipes_and_tasks(fake_programs, capsys):
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  good     Says what it was given." in lines
    assert not any("script" in line for line in lines)
    assert any("hopper-medium-replay-v2" in line.split() for line in lines)
    shipped = {path.stem for path in BEHAVIOURS_PATH.glob("*.safetensors")}
    assert all(any(f"{name}-medium-replay" in line.split() for line in lines) for name in shipped)


def test_run_gives_the_options_to_main(fake_programs, capsys, tmp_path):
    assert cli.main(["run", "good", "--out", str(tmp_path), "--seed", "3", "--fast"]) == 0
    assert capsys.readouterr().out == f"{ {'out': tmp_path, 'seed': 3, 'fast': True} }\n"


def test_wrong_options_end_with_status_2(fake_programs, capsys):
    for options in ([], ["--out", "x", "--sed", "3"], ["--out", "x", "--seed", "a"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["run", "good", *options])
        assert exit_.value.code == 2
        assert "rtb-rl run good" in capsys.readouterr().err


def test_an_unknown_name_gets_the_nearest_one(fake_programs, capsys):
    assert cli.main(["run", "goood"]) == 2
    assert error_line(capsys) == "there is no program 'goood'; did you mean good?\n"
    assert cli.main(["run", "xyz"]) == 2
    assert error_line(capsys) == "there is no program 'xyz'; there are good, lacking\n"
    assert cli.main(["evalaute", "x"]) == 2
    assert "did you mean evaluate?" in error_line(capsys)


def test_a_missing_package_is_named(fake_programs, capsys):
    assert cli.main(["run", "lacking"]) == 2
    assert "lacking needs no_such_package" in error_line(capsys)


@pytest.mark.parametrize("kind", [InputError, CheckpointError, NonFiniteError])
def test_a_mistake_is_one_line_and_status_2(kind, monkeypatch, capsys):
    def refuse(arguments):
        raise kind("this is\n  17 wide, that 6: cut it")

    monkeypatch.setattr(cli, "parse", refuse)
    assert cli.main(["list"]) == 2
    assert error_line(capsys) == "this is 17 wide, that 6: cut it\n"


def test_a_defect_is_not_hidden(monkeypatch):
    monkeypatch.setattr(cli, "parse", lambda arguments: lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["list"])


def test_interruption_is_status_130(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", interrupt)
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == "rtb-rl: interrupted\n"


def test_a_reader_may_leave_early():
    command = f"set -o pipefail; {shlex.quote(sys.executable)} -c '{LONG_OUTPUT}' | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "0\n", "")


LONG_OUTPUT = """
import sys
from rtb_rl import cli
cli.parse = lambda arguments: lambda: print(*range(100_000), sep="\\n")
sys.exit(cli.main(["list"]))
"""


class FinishedPolicy:
    """As `load_policy` returns it."""

    env_id = "Hopper-v5"
    reference_returns = (0.0, 200.0)


@pytest.fixture
def finished_run(monkeypatch):
    """Two episodes with returns 50 and 150, whatever the run; yields what was asked for."""
    asked = {}

    def run_episodes(policy, env_id, **options):
        asked.update(options, policy=policy, env_id=env_id)
        return rl.EpisodeRecords([50.0, 150.0], [10, 20], [True, False])

    def load_policy(directory, method):
        asked["directory"] = directory
        return FinishedPolicy()

    monkeypatch.setattr(rl, "load_policy", load_policy)
    monkeypatch.setattr(rl, "evaluate", run_episodes)
    return asked


def test_evaluate_prints_one_json_object(finished_run, capsys, tmp_path):
    arguments = ["evaluate", str(tmp_path), "--episodes", "2", "--seed", "7", "--json"]
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["returns"] == [50, 150]
    assert (report["mean_return"], report["normalised_score"]) == (100, 50)
    assert (report["env_id"], report["seed"]) == ("Hopper-v5", 7)
    assert finished_run["directory"] == tmp_path
    assert (finished_run["episodes"], finished_run["seed"]) == (2, 7)


def test_evaluate_prints_means_and_intervals(finished_run, capsys):
    assert cli.main(["evaluate", "runs/x"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["mean", "return", "100.0"]
    assert lines[2].split()[:3] == ["normalised", "score", "50.0"]
    assert finished_run["episodes"] == 20


def test_evaluate_needs_an_environment(finished_run, monkeypatch, capsys):
    monkeypatch.setattr(FinishedPolicy, "env_id", None)
    assert cli.main(["evaluate", "runs/x"]) == 2
    assert error_line(capsys) == "runs/x names no environment; run it with --env-id\n"


def test_collect_passes_its_options_on(monkeypatch, capsys):
    asked = {}

    def make_dataset(recipe, **options):
        asked.update(options, recipe=recipe)
        return "local/hopper/medium-v0"

    monkeypatch.setattr(rl, "collect", make_dataset)
    assert cli.main(["collect", "hopper-medium", "--steps", "500", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("local/hopper/medium-v0 ")
    expected = {"recipe": "hopper-medium", "steps": 500, "seed": 1}
    assert asked == {**expected, "dataset_id": None, "overwrite": False}


def test_collect_refuses_an_unknown_recipe(capsys):
    assert cli.main(["collect", "hoper-medium"]) == 2
    assert "hoper-medium" in error_line(capsys)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_has_the_agreed_options(name):
    settings = importlib.import_module(f"rtb_rl.agents.{name}").Settings
    fields = {field.name: field for field in dataclasses.fields(settings)}
    assert settings.__dataclass_params__.frozen and settings.__doc__
    data = {"text_to_image": {"prior", "prompts", "reward"}}  # the longer name first
    data |= {"image": {"data", "target"}, "language": {"data", "reward"}}
    own = next((data[word] for word in data if word in name), {"dataset", "env_id"})
    assert own | {"out", "seed", "budget"} <= set(fields)
    words = [word for option in sorted(own) for word in (f"--{option.replace('_', '-')}", "x")]
    for budget in ("smoke", "demo", "full"):
        arguments = [name, *words, "--out", "z", "--seed", "1", "--budget", budget]
        assert cli.parse(["run", *arguments])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_has_the_agreed_options(name):
    assert cli.parse(["bench", name, "--fast", "--out", "x"])
