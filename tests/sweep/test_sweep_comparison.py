"""Rows that are read are whole, single and comparable; anything else is refused with a cure."""

import json

import pytest
from synthetic_rows import grid, row, write

from rtb_rl.errors import InputError
from rtb_rl.sweep.aggregates import aggregate, headline
from rtb_rl.sweep.comparison import Comparison, read_rows, scores
from rtb_rl.sweep.provenance import run_table
from rtb_rl.sweep.tables import improvement_table


def test_rows_of_several_files_come_together(tmp_path):
    one = write(tmp_path / "a.jsonl", [row(seed=0)])
    two = write(tmp_path / "b.jsonl", [row(seed=1)])
    assert [each["seed"] for each in read_rows([one, two])] == [0, 1]


def test_a_broken_last_line_is_named_with_its_cure(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row(seed=0), row(seed=1)])
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match=r"rows.jsonl line 2 is not a whole row.*or remove"):
        read_rows([path])


def test_two_rows_of_one_cell_are_refused(tmp_path):
    one = write(tmp_path / "a.jsonl", [row(seed=0)])
    two = write(tmp_path / "b.jsonl", [row(seed=1), row(seed=0)])
    with pytest.raises(InputError, match=r"a.jsonl line 1 and .*b.jsonl line 2; remove one"):
        read_rows([one, two])


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"returns": []}, "0 returns"),
        ({"returns": None}, "returns that are a NoneType"),
        ({"returns": [float("nan")]}, "aren't finite"),
        ({"seed": "zero"}, "whole number"),
        ({"origin": None, "remove": "origin"}, "lacks origin"),
    ],
)
def test_rows_without_a_score_are_refused(tmp_path, changed, said):
    broken = row(**changed)
    broken.pop(changed.get("remove"), None)
    with pytest.raises(InputError, match=said):
        read_rows([write(tmp_path / "rows.jsonl", [broken])])


def test_no_file_and_no_rows_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        read_rows([tmp_path / "none.jsonl"])
    with pytest.raises(InputError, match="no rows"):
        Comparison(tuple(read_rows([write(tmp_path / "rows.jsonl", [])])))


@pytest.mark.parametrize(
    "changed, key",
    [
        ({"data_sha256": "cd" * 32}, "data_sha256"),
        ({"reference_returns": None}, "reference_returns"),
        ({"env_id": "Hopper-v5"}, "env_id"),
        ({"budget": "full"}, "budget"),
        ({"overrides": {"steps": 3}}, "overrides"),
        ({"beta": 4.0}, "beta"),
    ],
)
def test_runs_that_are_no_repetitions_are_refused(changed, key):
    with pytest.raises(InputError, match=f"runs differ in {key}.*seed 0.*seed 1"):
        Comparison((row(seed=0, beta=3.0), row(seed=1, **{"beta": 3.0, **changed})))


def test_rows_with_and_without_a_recorded_beta_are_of_one_agent():
    """Those of qgpo were written without it; two that are recorded must still agree."""
    rows = row("qgpo", seed=0, beta=None), row("qgpo", seed=1, beta=3.0)
    assert run_table(Comparison(rows)).rows[0][6].text == "3"
    with pytest.raises(InputError, match="runs differ in beta"):
        Comparison((*rows, row("qgpo", seed=2, beta=4.0)))


@pytest.mark.parametrize("rule", [{"kl": 0.5}, {"ess": 0.3}])
def test_beta_by_a_rule_is_each_seeds_own(rule):
    """Rows of one agent at 1.9 and 2.0 were refused as two different agents."""
    rows = (row(seed=0, overrides=rule, beta=1.8869), row(seed=1, overrides=rule, beta=2.0137))
    told = run_table(Comparison(rows)).rows[0][6].text
    assert told == "1.887, 2.014"


def test_agents_of_a_task_may_differ_in_budget_but_not_in_data():
    Comparison((row("iql"), row("rtb", budget="full")))
    with pytest.raises(InputError, match="data_sha256"):
        Comparison((row("iql"), row("rtb", data_sha256="0")))


def test_scores_are_normalised_only_with_reference_returns():
    assert scores(row(scores=(0.0, 100.0))).tolist() == pytest.approx([0.0, 100.0])
    assert scores(row(returns=[7.0], reference_returns=None)).tolist() == [7.0]


MEANS = {("a", "x"): 80, ("a", "y"): 40, ("b", "x"): 70, ("b", "y"): 30, ("a", "half"): 99}


def test_an_agent_that_lacks_a_task_is_in_no_aggregate():
    comparison = Comparison(tuple(grid(MEANS)))
    found = aggregate(comparison)
    assert comparison.missing == {"half": ("b",)}
    assert set(found.interquartile) == {"x", "y"} == set(found.profiles)
    assert ("a", "half") in found.cells and ("b", "half") not in found.cells
    assert set(found.improvement) == {("x", "y"), ("y", "x")}


def test_tasks_without_reference_returns_are_in_no_aggregate():
    extra = [row("x", "raw", s, returns=[1e6], reference_returns=None) for s in (0, 1)]
    with_raw = aggregate(Comparison((*grid(MEANS), *extra)))
    assert with_raw.interquartile == aggregate(Comparison(tuple(grid(MEANS)))).interquartile


def test_cells_do_not_change_when_an_agent_joins():
    small = {key: mean for key, mean in MEANS.items() if key[1] == "x"}
    rows = grid(small)
    joined = aggregate(Comparison((*rows, row("new", "a"), row("new", "b"))))
    alone = aggregate(Comparison(tuple(rows)))
    assert {k: v for k, v in joined.cells.items() if k[1] == "x"} == dict(alone.cells)
    assert joined.interquartile["x"] == alone.interquartile["x"]


def test_headline_names_the_leader_and_who_is_close():
    rows = grid({("a", "x"): 80, ("a", "y"): 40, ("b", "x"): 70, ("b", "y"): 30})
    comparison = Comparison(tuple(rows))
    text = headline(comparison, aggregate(comparison))
    assert text.startswith("Over 2 tasks, x has the highest interquartile mean of 2 agents: 7")
    assert text.endswith("more likely than not to beat those of each other agent.")
    twin = Comparison((*rows, *({**each, "agent": "z"} for each in rows if each["agent"] == "x")))
    text = headline(twin, aggregate(twin))
    assert text.endswith("don't set it apart from z.")
    named = [{**each, "agent": a} for a in "zw" for each in rows if each["agent"] == "x"]
    three = Comparison((*rows, *named))
    text = headline(three, aggregate(three))
    assert text.endswith("don't set it apart from x and z.")
    same = Comparison((*(each for each in rows if each["agent"] == "x"), *named))
    assert headline(same, aggregate(same)).endswith("don't set it apart from any other.")


def test_headline_without_an_aggregate_says_why():
    comparison = Comparison((row(reference_returns=None),))
    assert "no task has reference returns" in headline(comparison, aggregate(comparison))
    comparison = Comparison((row("x", "a"), row("y", "b")))
    assert "no agent has run every task" in headline(comparison, aggregate(comparison))


def test_rows_round_trip(tmp_path):
    rows = grid(MEANS)
    assert read_rows([write(tmp_path / "r.jsonl", rows)]) == json.loads(json.dumps(rows))


@pytest.mark.parametrize("counts", [(1, 1), (1, 3)])
def test_an_agent_of_single_runs_is_never_claimed_to_be_better(counts):
    """It stood still while the other was drawn anew: 100 (100 to 100), in bold and the headline.

    `counts`: its runs on the first task and on the second, where the other has three on both.
    """
    rows = [row("lucky", "x", seed, (80.0, 81.0)) for seed in range(counts[0])]
    rows += [row("lucky", "y", seed, (80.0, 81.0)) for seed in range(counts[1])]
    rows += [row("three", task, seed, (50.0 + seed,)) for task in "xy" for seed in range(3)]
    comparison = Comparison(tuple(rows))
    found = aggregate(comparison)
    assert headline(comparison, found).endswith("the runs don't set it apart from three.")
    table = improvement_table(found)
    cells = {table.rows[0][2].markdown, table.rows[1][1].markdown}
    interval = "" if counts == (1, 1) else " ({0} to {0})"
    assert cells == {f"{value}\u2020{interval.format(value)}" for value in (100, 0)}
    assert "single run" in table.markdown()


def test_with_several_runs_on_every_task_nothing_is_marked():
    found = aggregate(Comparison(tuple(grid(MEANS))))
    assert "\u2020" not in improvement_table(found).markdown()


def test_one_name_for_two_programs_is_refused():
    rows = [row("mine", "a", program="iql"), row("mine", "b", program="rtb_iql")]
    with pytest.raises(InputError, match="agent 'mine': runs differ in program, \"iql\""):
        Comparison(tuple(rows))
    assert Comparison((rows[0], row("mine", "b"))).agents == ("mine",)
