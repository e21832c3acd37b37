"""A grid file is checked whole before any cell starts, and its directory keeps to it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_grids import COUNTING, write_episodes, write_grid

from rtb_rl.errors import InputError
from rtb_rl.sweep.data import check_data, data_paths
from rtb_rl.sweep.grid import chosen, keep_grid, read_grid
from rtb_rl.sweep.programs import launcher

GOOD = f"""
agents = ["rtb_iql", "{COUNTING}"]
seeds = [0, 1]
[settings]
beta = 2.0
[tasks.one]
dataset = "one.hdf5"
[tasks.two]
dataset = "two.hdf5"
env-id = "Pendulum-v1"
[agents_settings.rtb_iql]
beta = 3.0
clip-actions = true
"""
PLAIN = GOOD[: GOOD.index("[agents_settings")]
BAD = {
    "not toml": ("agents = [", "is not TOML"),
    "unknown key": (f"{GOOD}\n[task.x]\n", "no key 'task'; did you mean tasks"),
    "no such agent": (
        GOOD.replace("rtb_iql", "rtb_iqll"),
        "no program 'rtb_iqll'; there are rtb_iql",
    ),
    "no such module": (GOOD.replace("fake_programs.", "no_programs."), "needs the module no_pr"),
    "a module that is no program": (GOOD.replace(COUNTING, "rtb_rl.errors"), "is no program"),
    "another kind of program": (
        PLAIN.replace("rtb_iql", "rtb_rl.benchmarks.speed"),
        "has no --dataset",
    ),
    "unknown option": (GOOD.replace("\nbeta = 2", "\nbta = 2"), "no option 'bta'; it has beta"),
    "option of the task": (
        GOOD.replace("env-id", "enw_id"),
        "task two, agent rtb_iql: .* 'enw_id'",
    ),
    "given by the runner": (GOOD.replace("beta = 3.0", "seed = 3"), "seed is given by the runner"),
    "named twice": (f"{GOOD}clip_actions = true\n", "name one twice"),
    "not a number": (
        GOOD.replace("3.0", '"much"'),
        "task one, agent rtb_iql: Error parsing --beta",
    ),
    "not a choice": (GOOD.replace("beta = 3.0", 'budget = "big"'), "'big' .* '?demo'?"),
    "not a flag": (GOOD.replace("actions = true", "actions = 1"), "clip_actions is 1; it needs t"),
    "a flag for a number": (GOOD.replace("3.0", "true"), "beta is True; it needs a value other"),
    "same seed twice": (GOOD.replace("[0, 1]", "[0, 1, 0]"), "seeds has 0 more than once"),
    "same agent twice": (
        GOOD.replace(f'"{COUNTING}"', '"rtb_iql"'),
        "agents has 'rtb_iql' more than",
    ),
    "no seeds": (GOOD.replace("[0, 1]", "[]"), "seeds is \\[\\]; give a list of whole numbers"),
    "a word for a seed": (GOOD.replace("[0, 1]", '["0"]'), "give a list of whole numbers"),
    "true for a seed": (GOOD.replace("[0, 1]", "[true]"), "give a list of whole numbers"),
    "a seed below zero": (GOOD.replace("[0, 1]", "[0, -1]"), "seeds has -1; give whole numbers"),
    "a strength below zero": (
        GOOD.replace("3.0", "-3.0"),
        "task one, agent rtb_iql: beta is -3.0; give a positive number",
    ),
    "two rules for one strength": (f"{GOOD}kl = 0.5\n", "task one, agent rtb_iql: .*beta 3.0"),
    "no candidates": (f"{GOOD}candidates = 0\n", "agent rtb_iql: --candidates is 0; give at lea"),
    "no step of a critic": (f"{GOOD}critic_steps = 0\n", "rtb_iql: --critic-steps is 0; give at"),
    "a step that TD3+BC has no use for": (
        PLAIN.replace("rtb_iql", "td3_bc").replace("\nbeta = 2.0", "\nsteps = -5"),
        "task one, agent td3_bc: TD3\\+BC got steps=-5",
    ),
    "a peer without its interpreter": (
        PLAIN.replace("rtb_iql", "d3rlpy_peer").replace("\nbeta = 2.0", ""),
        "task one, agent d3rlpy_peer: no interpreter with d3rlpy was given",
    ),
    "seeds at once in a grid of seeds": (
        PLAIN.replace("rtb_iql", "rtb_iql_seeds"),
        "agent rtb_iql_seeds: .* can't take --stages",
    ),
    "a range that ends below the strength": (
        PLAIN.replace("rtb_iql", "rtb_amortised").replace("2.0", "20.0\nhigh = 5.0"),
        "agent rtb_amortised: beta 20 is outside the strengths 0.3 to 5",
    ),
    "no guidance": (
        PLAIN.replace("rtb_iql", "qgpo").replace("2.0", "2.0\nscale = inf"),
        "agent qgpo: --scale is inf; give a finite number",
    ),
    "no tasks": (GOOD[: GOOD.index("[tasks.one]")], "tasks is empty"),
    "no dataset": (GOOD.replace('dataset = "one.hdf5"', ""), "task one has dataset None"),
    "empty mixture": (GOOD.replace('"one.hdf5"', "[]"), "task one has dataset \\[\\]"),
    "a path for a name": (GOOD.replace("tasks.one", 'tasks."../one"'), "can't name a directory"),
    "no program": (f'{GOOD}program = ""\n', "the program is ''; name one, such as rtb_iql"),
    "a path for an agent": (
        PLAIN.replace('"rtb_iql"', '"../rtb_iql"'),
        "'../rtb_iql' can't name a directory",
    ),
    "agent left out": (
        GOOD.replace("settings.rtb_iql", "settings.bc"),
        "no agent of the grid: 'bc'",
    ),
}


def cells_of(path: Path):
    grid = read_grid(path)
    return grid.cells(data_paths(grid, Path("/grid")), Path("/grid"))


def words_of(cell, root):
    """The command line, but for what depends on where this process looks for modules."""
    return [word for word in cell.command(root) if word != "-P"]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return path


def test_cells_come_by_seed_then_task_then_agent_with_the_nearest_option(tmp_path):
    cells = cells_of(written(tmp_path, GOOD))
    agents = ("rtb_iql", COUNTING)
    assert [c.key for c in cells] == [
        (task, agent, seed) for seed in (0, 1) for task in ("one", "two") for agent in agents
    ]
    command = words_of(cells[2], Path("/grid"))
    assert command[1:5] == ["-m", "rtb_rl", "run", "rtb_iql"]
    assert command[5:] == [
        "--dataset=two.hdf5",
        "--seed=0",
        "--out=/grid/cells/two/rtb_iql/seed0",
        "--stages=/grid/stages",
        "--beta=3.0",
        "--clip-actions",
        "--env-id=Pendulum-v1",
    ]
    assert words_of(cells[3], Path("/grid"))[1:3] == ["-m", COUNTING]
    assert cells[3].overrides == {"beta": 2.0, "env_id": "Pendulum-v1"}


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ((), 8),
        (("two",), 4),
        (("rtb_iql", "one"), 2),
        (("one", "two", "1"), 4),
        (("rtb_iql", "two", "0"), 1),
    ],
)
def test_cells_are_chosen_by_the_names_of_tasks_agents_and_seeds(names, wanted, tmp_path):
    cells = cells_of(written(tmp_path, GOOD))
    found = chosen(cells, names)
    assert len(found) == wanted and found == [cell for cell in cells if cell in found]
    for kind in ({"one", "two"}, {"rtb_iql", COUNTING}, {"0", "1"}):
        asked = kind & set(names) or kind
        words = {str(word) for cell in found for word in cell.key}
        assert words & kind == asked


def test_a_name_of_no_cell_is_refused(tmp_path):
    with pytest.raises(InputError, match="no task, agent or seed 'twoo'; did you mean two"):
        chosen(cells_of(written(tmp_path, GOOD)), ("one", "twoo"))


def test_a_flag_is_left_out_at_its_default_and_turned_off_by_its_negative(tmp_path):
    for value, words in (("true", []), ("false", ["--no-grouped-log-z"])):
        text = f'agents = ["rtb_iql"]\nseeds = [0]\n[settings]\ngrouped_log_z = {value}\n'
        (cell,) = cells_of(written(tmp_path, text + '[tasks.one]\ndataset = "one.hdf5"\n'))
        assert list(cell.words) == words


def test_an_agent_of_another_name_is_a_program_with_other_options(tmp_path):
    text = GOOD.replace('agents = ["rtb_iql"', 'agents = ["rtb_iql", "strong"')
    text += '[agents_settings.strong]\nprogram = "rtb_iql"\nbeta = 10.0\n'
    cells = [cell for cell in cells_of(written(tmp_path, text)) if cell.agent == "strong"]
    assert cells and {cell.program for cell in cells} == {"rtb_iql"}
    assert cells[0].overrides == {"beta": 10.0}
    words = words_of(cells[0], tmp_path)
    assert words[2:4] == ["rtb_rl", "run"] and words[4] == "rtb_iql" and "--beta=10.0" in words
    assert "cells/one/strong/seed0" in str(cells[0].path)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_grid_is_refused_in_one_sentence(case, tmp_path):
    text, complaint = BAD[case]
    assert text != GOOD
    with pytest.raises(InputError, match=complaint):
        cells_of(written(tmp_path, text))


def test_a_grid_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.toml can't be read"):
        read_grid(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("dataset", "options", "complaint"),
    [
        ("absent.hdf5", {}, "task a: .*absent.hdf5: no such file"),
        ("cut.hdf5", {}, "task a: .*cut.hdf5: .*truncated or damaged"),
        ("text.hdf5", {}, "isn't an HDF5 file"),
        ("nameless.hdf5", {}, "give it with --env-id.*env_id in a grid"),
        ("whole.hdf5", {"env_id": "MountainCarContinuous-v0"}, "environment observes 2 numbers"),
    ],
)
def test_data_that_no_program_could_use_are_refused(dataset, options, complaint, tmp_path):
    whole = Path(write_episodes(tmp_path / "whole.hdf5"))
    write_episodes(tmp_path / "nameless.hdf5", env="")
    (tmp_path / "cut.hdf5").write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "text.hdf5").write_text("observations")
    task = {"dataset": str(tmp_path / dataset), **options}
    grid = read_grid(write_grid(tmp_path / "grid.toml", tasks={"a": task}))
    with pytest.raises(InputError, match=complaint):
        check_data(grid, data_paths(grid, tmp_path))


ALL = [
    (task, agent, seed)
    for task in ("one", "two")
    for agent in ("rtb_iql", COUNTING)
    for seed in (0, 1, 2)
]


def kept(root, text, digests=("1", "2"), begun=ALL):
    (root / "grid.toml").write_text(text)
    grid = read_grid(root / "grid.toml")
    keep_grid(root, grid, dict(zip(grid.tasks, [*digests, "3"])), begun=begun)


def test_a_directory_takes_more_agents_tasks_and_seeds(tmp_path):
    kept(tmp_path, GOOD)
    more = GOOD.replace("[0, 1]", "[2, 1, 0]").replace('"rtb_iql"', '"rtb_iql", "diffusion_bc"')
    more += '[agents_settings.diffusion_bc]\nbeta = 9.0\n[tasks.three]\ndataset = "3.hdf5"\n'
    kept(tmp_path, more)
    with pytest.raises(InputError, match="another grid: it has seed 2, which this one lacks"):
        kept(tmp_path, GOOD)


@pytest.mark.parametrize(
    ("text", "digests", "complaint"),
    [
        (GOOD.replace("2.0", "2.5"), ("1", "2"), "settings has beta 2.0 there and 2.5 here"),
        (GOOD.replace("3.0", "3.5"), ("1", "2"), "agent rtb_iql has beta 3.0 there and 3.5 here"),
        (GOOD.replace("two.hdf5", "2.hdf5"), ("1", "2"), "task two has dataset 'two.hdf5' there"),
        (GOOD, ("1", "9"), "task two has data_sha256 '2' there and '9' here"),
        (GOOD.replace("[0, 1]", "[1]"), ("1", "2"), "it has seed 0, which this one lacks"),
        (GOOD.replace("[tasks.two]", "[tasks.three]"), ("1", "2"), "it has task two"),
    ],
)
def test_a_directory_refuses_another_grid_and_keeps_its_own(text, digests, complaint, tmp_path):
    kept(tmp_path, GOOD)
    before = (tmp_path / "grid.json").read_bytes()
    with pytest.raises(InputError, match=re.escape(complaint)):
        kept(tmp_path, text, digests)
    assert (tmp_path / "grid.json").read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace("beta = 3.0", "beta = 5.0"),
        GOOD.replace("[tasks.two]", "[tasks.three]"),
        GOOD.replace("[0, 1]", "[0]"),
        GOOD[: GOOD.index("[agents_settings")].replace('"rtb_iql", ', ""),
    ],
)
def test_what_never_ran_may_be_put_right_or_left_out(text, tmp_path):
    """A wrong option of one agent, found when it ran, cost the finished cells of all others."""
    kept(tmp_path, GOOD)
    with pytest.raises(InputError, match="holds another grid"):
        kept(tmp_path, text)
    kept(tmp_path, text, begun=[("one", COUNTING, 0)])
    with pytest.raises(InputError, match="settings has beta 2.0 there and 2.5 here"):
        kept(tmp_path, text.replace("beta = 2.0", "beta = 2.5"), begun=[("one", COUNTING, 0)])
    kept(tmp_path, text.replace("beta = 2.0", "beta = 2.5"), begun=[])


@pytest.mark.parametrize("beside", [False, True])
def test_a_cell_runs_the_package_that_the_runner_runs(tmp_path, monkeypatch, beside):
    (tmp_path / "rtb_rl").mkdir()
    (tmp_path / "rtb_rl" / "__main__.py").write_text("print('the folder beside')")
    monkeypatch.chdir(tmp_path)
    # `rtb-rl` does not look for modules where it is called, `python -m rtb_rl` does.
    elsewhere = [path for path in sys.path if path not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", [str(tmp_path)] * beside + elsewhere)

    command = [*launcher("rtb_iql"), "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    assert ("the folder beside" in said) == beside
