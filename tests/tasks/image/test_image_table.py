"""The table of finished runs: means and errors over seeds, one table a target, bad input."""

import json

import pytest
import torch
from rtb_rl.benchmarks.image_table import Settings, main, mean_over_seeds, rows_of, tables
from safetensors.torch import save_file

from rtb_rl.errors import InputError

ROW = {
    "method": "rtb",
    "log_reward_error": 0.5,
    "reference_log_reward": -0.1,
    "reference_log_reward_error": 0.01,
    "reference_log_z": -0.7,
    "reference_log_z_error": 0.02,
    "reference_ess": 0.5,
    "reference_judged": -0.2,
    "reference_judged_error": 0.02,
    "reference_diversity": 0.4,
    "frechet_halves": 10.0,
    "collapsed": 0.0,
    "ess": None,
    "histogram": [0.25, 0.75],
}

POSTERIOR = {"lora_rank": None, "finetune": {"beta": 1.0, "learning_rate": 8e-5}}
BUDGET = {"prior": {"levels": 20}, "classifier": {"steps": 2000}, "posterior": POSTERIOR}


def finished(directory, seed, value, target="class 3", budget=None, sha=None, **asked):
    directory.mkdir()
    (directory / "figure.png").write_bytes(b"png")
    (directory / "posterior").mkdir()
    (directory / "rows").mkdir()
    save_file({"x0": torch.zeros(3, 1, 4, 4)}, directory / "rows" / "rtb.safetensors")
    config = {"data": "folder/digits", "data_sha256": "x", "seed": seed, "beta": 1.0}
    config |= {"program": "rtb_image", "settings": BUDGET | (budget or {}), **asked}
    row = {**ROW, "log_reward": value}
    for name, content in (
        ("config", config),
        ("manifest", {"commit": "abc"}),
        ("results", {"methods": {"rtb": row}, "target": target, **(sha or {})}),
    ):
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_the_error_over_seeds_is_that_of_their_mean():
    ordered = {"log_reward": 0.0, **ROW}  # a number before its error, as rows have them
    rows = [{**ordered, "log_reward": value} for value in (-1.0, -2.0, -3.0)]
    mean = mean_over_seeds(rows)
    assert mean["log_reward"] == pytest.approx(-2.0)
    assert mean["log_reward_error"] == pytest.approx(1.0 / 3**0.5)
    assert mean["reference_log_reward_error"] == pytest.approx(0.01)  # of one reference
    assert mean["ess"] is None
    assert mean_over_seeds(rows[:1])["log_reward_error"] == 0.5  # of the draws


def test_runs_become_one_table_a_target(tmp_path):
    runs = (
        finished(tmp_path / "a", 0, -1.0),
        finished(tmp_path / "b", 1, -3.0),
        finished(tmp_path / "c", 0, -9.0, "class 4"),
    )
    main(Settings(runs, tmp_path / "out"))
    text = (tmp_path / "out" / "table.md").read_text()
    assert "### digits, class 3" in text and "### digits, class 4" in text
    assert "| rtb, 2 seeds | -2.000 ± 1.000 |" in text and "| rtb | -9.000 ± 0.500" in text
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [0, 1, 0]
    assert "folder" not in (tmp_path / "out" / "rows.jsonl").read_text()
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {
        "a.png",
        "b.png",
        "c.png",
        "digits_class_3_beta_1.png",
        "digits_class_4_beta_1.png",
    }


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no results\.json; finish that run first"):
        rows_of(tmp_path)
    with pytest.raises(InputError, match="no runs"):
        main(Settings((), tmp_path / "out"))


def test_every_beta_has_a_table_of_its_own(tmp_path):
    runs = (finished(tmp_path / "a", 0, -1.0), finished(tmp_path / "b", 0, -3.0, beta=5.0))
    text = tables([row for run in runs for row in rows_of(run)])
    assert "### digits, class 3, beta 1\n" in text and "### digits, class 3, beta 5\n" in text
    assert "seeds" not in text


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "both hold 'rtb' of seed 0"),
        ({"budget": {"prior": {"levels": 30}}}, "levels 20 and 30"),
        ({"budget": {"prior": {"levels": 20, "widths": [8]}}}, "prior settings"),
        ({"budget": {"classifier": {"steps": 20}}}, "classifier"),
        ({"prior": "elsewhere/ddpm"}, "prior None and 'elsewhere/ddpm'"),
        ({"unclipped": True}, "unclipped False and True"),
        ({"prior_seed": 1}, "prior_seed None and 1"),
        ({"program": "rtb_text_to_image"}, "is no run of rtb_image or image_baselines"),
    ],
)
def test_runs_that_are_no_seeds_of_one_thing_are_refused(asked, says, tmp_path):
    runs = (finished(tmp_path / "a", 0, -1.0), finished(tmp_path / "b", 0, -3.0, **asked))
    with pytest.raises(InputError, match=says):
        tables([row for run in runs for row in rows_of(run)])


def test_priors_are_told_apart_by_their_weights(tmp_path):
    """By their folders only where a run kept no fingerprint; a copy elsewhere is the same prior."""
    one, two = {"prior_sha256": "1"}, {"prior_sha256": "2"}
    first = finished(tmp_path / "a", 0, -1.0, prior="here/ddpm", sha=one)
    moved = finished(tmp_path / "b", 1, -3.0, prior="there/copy", sha=one)
    trained_on = finished(tmp_path / "c", 1, -3.0, prior="here/ddpm", sha=two)
    older = finished(tmp_path / "d", 1, -3.0, prior="here/ddpm")
    other = finished(tmp_path / "e", 1, -3.0, prior="there/ddpm")
    assert "| rtb, 2 seeds |" in tables([*rows_of(first), *rows_of(moved)])
    assert "| rtb, 2 seeds |" in tables([*rows_of(first), *rows_of(older)])
    with pytest.raises(InputError, match="prior_sha256 '1' and '2'"):
        tables([*rows_of(first), *rows_of(trained_on)])
    with pytest.raises(InputError, match="prior 'here/ddpm' and 'there/ddpm'"):
        tables([*rows_of(first), *rows_of(other)])


def test_what_runs_of_a_method_differ_in_stands_beside_it(tmp_path):
    rank = {"posterior": POSTERIOR | {"lora_rank": 4}}
    slower = {"posterior": POSTERIOR | {"finetune": {"beta": 1.0, "learning_rate": 1e-5}}}
    runs = (
        finished(tmp_path / "a", 0, -1.0),
        finished(tmp_path / "b", 1, -3.0),
        finished(tmp_path / "c", 1, -5.0, budget=rank, lora_rank=4),
        finished(tmp_path / "d", 1, -5.0, budget=slower),
        finished(tmp_path / "e", 1, -5.0, learning_rate=3e-4),
        finished(tmp_path / "f", 1, -5.0, calls=50.0),
    )
    main(Settings(runs, tmp_path / "out"))
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()[5:]
    assert [line.split(" | ")[0] for line in lines] == [
        "| rtb, finetune.learning_rate 8e-05, 2 seeds",
        "| rtb, lora_rank 4, finetune.learning_rate 8e-05",
        "| rtb, finetune.learning_rate 1e-05",
        "| rtb, learning_rate 0.0003, finetune.learning_rate 8e-05",
        "| rtb, calls 50.0, finetune.learning_rate 8e-05",
    ]
