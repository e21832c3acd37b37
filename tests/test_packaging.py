"""What a user gets: what `import rtb_rl` loads, what lies in the wheel and the source archive."""

import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAKS = (
    "benchmarks/results/rows.jsonl",
    "agents/data/transitions.npz",
    "rtb_rl/rl/data/data.hdf5",
    "runs/demo/config.json",
    "data/hopper.hdf5",
)


def run_python(code: str, directory: Path = ROOT) -> dict:
    """What `code`, run in a new interpreter from there, prints last, read as JSON."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_importing_the_package_loads_torch_and_numpy_only():
    report = run_python(
        "import json, numpy, sys, time, torch\n"
        "before, start = set(sys.modules), time.process_time()\n"
        "import rtb_rl\n"
        "seconds = time.process_time() - start\n"
        "print(json.dumps({'new': sorted(set(sys.modules) - before), 'seconds': seconds}))"
    )
    tops = {name.partition(".")[0] for name in report["new"]}
    assert tops - sys.stdlib_module_names <= {"rtb_rl", "torch", "numpy"}
    assert report["seconds"] < 2  # of this process; about a tenth where nothing is wrong


def test_every_room_can_be_imported_first():
    tops = [path for path in (ROOT / "rtb_rl").iterdir() if path.suffix == ".py"]
    rooms = [path.parent for path in (ROOT / "rtb_rl").glob("*/**/__init__.py")]
    modules = {
        ".".join(top.relative_to(ROOT).with_suffix("").parts): [
            path.stem for path in top.glob("*.py")
        ]
        for top in sorted(tops + rooms)
    }
    failed = run_python(
        "import importlib, json, sys, traceback\n"
        "failed = {}\n"
        f"for room, names in {modules}.items():\n"
        "    for name in [name for name in sys.modules if name.split('.')[0] == 'rtb_rl']:\n"
        "        del sys.modules[name]\n"
        "    try:\n"
        "        for name in [room, *(f'{room}.{name}' for name in names)]:\n"
        "            importlib.import_module(name)\n"
        "    except Exception:\n"
        "        failed[name] = traceback.format_exc(limit=-1)\n"
        "print(json.dumps(failed))\n"
    )
    assert failed == {}


def test_every_package_is_listed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "rtb_rl").rglob("__init__.py")]
    expected = {".".join(folder.parts) for folder in folders} | {
        "rtb_rl.agents",
        "rtb_rl.benchmarks",
    }
    assert set(project["tool"]["setuptools"]["packages"]) == expected


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[set[str], Path]:
    """The names in the source archive, and the wheel that was built from it.

    They are built from a copy of the tree with files strewn in that must not travel.
    """
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("rtb_rl", "agents", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for leak in LEAKS:
        (tree / leak).parent.mkdir(parents=True, exist_ok=True)
        (tree / leak).write_text("{}")
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    return names, next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel_names(archives) -> set[str]:
    return set(zipfile.ZipFile(archives[1]).namelist())


def test_the_wheel_has_one_top_level_name(wheel_names):
    tops = {name.partition("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rtb_rl"}


def test_the_wheel_has_every_module_and_program(wheel_names):
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rtb_rl").rglob("*.py")}
    programs = {
        f"rtb_rl/{path.relative_to(ROOT).as_posix()}"
        for folder in ("agents", "benchmarks")
        for pattern in ("*.py", "*.toml")
        for path in (ROOT / folder).glob(pattern)
    }
    assert library | programs <= wheel_names


def test_the_wheel_has_the_policies_the_licence_and_the_type_marker(wheel_names):
    behaviours = (ROOT / "rtb_rl/rl/data/behaviours").glob("*.safetensors")
    assert {path.relative_to(ROOT).as_posix() for path in behaviours} <= wheel_names
    assert "rtb_rl/py.typed" in wheel_names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)


def test_nothing_but_the_package_travels(archives, wheel_names):
    source_names, _ = archives
    names = {leak.rpartition("/")[2] for leak in LEAKS}
    assert not [name for name in source_names | wheel_names if name.rpartition("/")[2] in names]
    allowed = {".py", ".toml", ".typed", ".safetensors"}
    code = {name for name in wheel_names if ".dist-info/" not in name}
    assert {Path(name).suffix for name in code} <= allowed
    assert {"README.md", "LICENSE", "pyproject.toml"} <= source_names


def test_the_wheel_runs_where_it_is_unpacked(archives, tmp_path):
    zipfile.ZipFile(archives[1]).extractall(tmp_path)
    report = run_python(
        "import json, rtb_rl, rtb_rl.agents\n"
        "from rtb_rl.cli import programs\n"
        "found = [*programs('rtb_rl.agents'), *programs('rtb_rl.benchmarks')]\n"
        "places = [rtb_rl.__file__, rtb_rl.agents.__file__]\n"
        "print(json.dumps({'programs': found, 'places': places, 'version': rtb_rl.__version__}))",
        tmp_path,
    )
    assert all(Path(place).is_relative_to(tmp_path) for place in report["places"])
    assert archives[1].name.startswith(f"rtb_rl-{report['version']}-")
    sources = [*(ROOT / "agents").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    expected = {path.stem for path in sources if "class Settings" in path.read_text()}
    assert set(report["programs"]) == expected
