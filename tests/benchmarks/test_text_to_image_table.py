"""Finished text-to-image runs become tables and a curve; some runs don't go together."""

import json
from collections import defaultdict
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from matplotlib import image as files
from rtb_rl.benchmarks.text_to_image_table import Settings, joined, main, panel_of, tables
from safetensors.torch import save_file

from rtb_rl import cli
from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image.tradeoff import EXACT, Panel, Point, draw_tradeoff
from rtb_rl.training.table import mean_over_seeds

ROW = {
    "log_reward_error": 0.5,
    "reference_log_reward_error": 0.01,
    "diversity_error": 0.02,
    "reference_log_z": -0.7,
    "reference_log_z_error": 0.02,
    "reference_ess": 0.5,
    "collapsed": 0.0,
    "ess": None,
    "calls": 40,
    "shares": [0.25, 0.75],
    "prompts": {"a shape": {"log_reward": -1.0}},
}
CONFIG = {
    "program": "rtb_text_to_image",
    "prior": "models/shapes",
    "prompts": ["a shape"],
    "negative": "",
    "size": None,
    "embedder": None,
    "prior_seed": 0,
    "reward": "clip:models/judge",
    "group_log_z": False,
    "lora_rank": None,
    "seed": 0,
    "beta": 1.0,
}
BUDGET = {"levels": 20, "guidance": 2.0, "reference_draws": 5000}
POSTERIOR = {"lora_rank": None, "finetune": {"updates": 300, "beta": 1.0}}
TARGETS = {0.5: (-1.5, 0.5), 1.0: (-1.0, 0.4), 2.0: (-0.5, 0.3)}
"""Beta -> what the target has of reward and diversity."""


def numbers(log_reward, diversity, beta):
    reward, spread = TARGETS[beta]
    own = {"log_reward": log_reward, "diversity": diversity}
    return {**own, "reference_log_reward": reward, "reference_diversity": spread}


def finished(directory, methods, budget=BUDGET, posterior=POSTERIOR, sha="5eed", told=(), **config):
    """A run with methods {name: (log_reward, diversity)}, each with three images of one colour."""
    (directory / "rows").mkdir(parents=True)
    config = {**CONFIG, "settings": {**budget, "posterior": posterior}, **config}
    rows = {}
    for index, (name, (log_reward, diversity)) in enumerate(methods.items()):
        rows[name] = {"method": name, **ROW, **numbers(log_reward, diversity, config["beta"])}
        images = torch.full((3, 3, 4, 4), 60 * index, dtype=torch.uint8)
        save_file({"images": images}, directory / "rows" / f"{name}.safetensors")
    results = {"methods": rows, "target": "x", "classes": ["one", "two"], "prior_sha256": sha}
    results |= dict(told)
    for name, content in (("config", config), ("manifest", {"commit": "c"}), ("results", results)):
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def several(tmp_path):
    """Two seeds at beta 0.5 and 2, one at 1; a baseline at beta 1."""
    prior = {"prior": (-2.0, 0.6)}
    return (
        finished(tmp_path / "a", {**prior, "rtb": (-1.4, 0.48)}, beta=0.5),
        finished(tmp_path / "b", {**prior, "rtb": (-1.8, 0.52)}, beta=0.5, seed=1),
        finished(tmp_path / "d", {**prior, "rtb": (-0.6, 0.25)}, beta=2.0),
        finished(tmp_path / "e", {**prior, "rtb": (-0.8, 0.27)}, beta=2.0, seed=1),
        finished(tmp_path / "c", {**prior, "rtb": (-1.1, 0.41)}, beta=1.0),
        finished(
            tmp_path / "f", {"DDPO": (-0.2, 0.1)}, program="text_to_image_baselines", against="a"
        ),
    )


def test_means_over_seeds_by_hand():
    ordered = {"log_reward": 0.0, "log_z": -1.0, "log_z_error": 0.3, **ROW}
    rows = [{**ordered, "log_reward": value} for value in (-1.0, -2.0, -6.0)]
    rows[1]["log_z"] = rows[2]["log_z"] = None
    rows[2]["reference_log_reward_error"] = 0.04
    before = deepcopy(rows)
    mean = mean_over_seeds(rows)
    assert mean["log_reward"] == pytest.approx(-3.0)
    assert mean["log_reward_error"] == pytest.approx(((4 + 1 + 9) / 2 / 3) ** 0.5)
    assert mean["reference_log_reward_error"] == pytest.approx(0.02)
    assert mean["log_z"] == -1.0 and mean["log_z_error"] is None  # of one seed alone
    assert mean["calls"] == 40 and isinstance(mean["calls"], int)
    assert mean["ess"] is mean["shares"] is mean["prompts"] is None
    assert mean_over_seeds(rows[:1]) == rows[0] and rows == before


def test_a_beta_for_each_number_of_a_latent_is_another_table(tmp_path):
    """And an old run that doesn't say how many numbers there are is refused."""
    each = {**POSTERIOR, "per_dimension": True}
    runs = [
        finished(tmp_path / "a", {"rtb": (-1.0, 0.4)}),
        finished(tmp_path / "b", {"rtb": (-0.1, 0.2)}, posterior=each, told={"beta": 256.0}),
    ]
    _, groups = joined(runs)
    assert list(groups["shapes, clip:judge"]) == [1.0, 256.0]
    runs[1] = finished(tmp_path / "c", {"rtb": (-0.1, 0.2)}, posterior=each)
    with pytest.raises(InputError, match="give its command again"):
        joined(runs)


def test_runs_become_one_table_a_beta(tmp_path):
    main(Settings(several(tmp_path), tmp_path / "out"))
    text = (tmp_path / "out" / "table.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("###")]
    assert headings == [f"### shapes, clip:judge, beta {beta}" for beta in ("0.5", "1", "2")]
    first, second, third = text.split("###")[1:]
    assert '"a shape"; guidance 2, 20 levels.' in first
    assert "| rtb, 2 seeds | -1.600 ± 0.200 |" in first and "DDPO" not in first
    assert "| *reference* | -1.500 ± 0.010 |" in first
    assert "| rtb | -1.100 ± 0.500 |" in second and "| DDPO | -0.200 ± 0.500 |" in second
    assert "| rtb, 2 seeds | -0.700 ± 0.100 |" in third
    assert third.count("| prior |") == 1, "its draws are the same for every seed"
    lines = (tmp_path / "out" / "rows.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len(rows) == 11 and "models" not in lines and str(tmp_path) not in lines
    shown = ("run", "method", "beta", "seed", "prior", "prior_sha256", "reward", "guidance")
    assert [rows[-1][name] for name in shown] == [
        *("f", "DDPO", 1.0, 0, "shapes", "5eed", "clip:judge", 2.0)
    ]
    assert list(rows[0]["prompts"]) == ["a shape"] and rows[0]["manifest"] == {"commit": "c"}


def test_the_curve_has_the_targets_points_and_the_means_over_seeds(tmp_path):
    _, groups = joined(several(tmp_path))
    (panel,) = map(panel_of, groups.values())
    assert panel.exact[0] == Point(0.0, -2.0, 0.5, 0.6, 0.02), "the prior is the target at beta 0"
    assert panel.exact[1:] == [Point(b, r, 0.01, d, None) for b, (r, d) in TARGETS.items()]
    first, second, third = panel.methods["rtb"]
    assert [point.beta for point in (first, second, third)] == [0.5, 1.0, 2.0]
    assert first.log_reward == pytest.approx(-1.6) and first.diversity == pytest.approx(0.5)
    assert first.log_reward_error == pytest.approx(0.2)
    assert first.diversity_error == pytest.approx(0.02)
    assert second == Point(1.0, -1.1, 0.5, 0.41, 0.02)
    assert third.log_reward == pytest.approx(-0.7)
    assert panel.methods["DDPO"] == [Point(1.0, -0.2, 0.5, 0.1, 0.02)]
    assert "8 x 8 fields" in panel.features


def test_the_order_of_the_runs_does_not_matter_to_the_curve(tmp_path):
    """Methods that were trained have numbers that the prior and others lack."""
    trained = dict.fromkeys(("elbo", "kl", "log_z", "log_z_error"), 0.5)
    runs = several(tmp_path)
    for run in runs[2:]:
        results = json.loads((run / "results.json").read_text())
        for name in results["methods"].keys() - {"prior"}:
            results["methods"][name] |= trained
        (run / "results.json").write_text(json.dumps(results))
    panels = [panel_of(joined(order)[1]["shapes, clip:judge"]) for order in (runs, runs[::-1])]
    assert panels[0].exact == panels[1].exact and len(panels[0].exact) == 4


def test_the_curve_is_drawn_where_its_points_are(tmp_path):
    exact = [Point(0.0, -2.0, None, 0.6, None), Point(4.0, -1.0, 0.1, 0.4, 0.02)]
    panel = Panel(exact, {"rtb": [Point(0.5, -1.5, 0.1, 0.5, None)]}, "features of CLIP")
    figure = draw_tradeoff(tmp_path / "curve.png", {"one": panel, "two": panel, "three": panel})
    first, *others = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in (first, *others)] == ["one", "two", "three"]
    containers = {held.get_label(): held for held in first.containers}
    assert list(containers) == [EXACT, "rtb"]
    line, _, (across, upward) = containers[EXACT]
    assert line.get_xydata().tolist() == [[0.6, -2.0], [0.4, -1.0]]
    ends = upward.get_segments()[1]
    assert ends[:, 1].tolist() == pytest.approx([-1.1, -0.9])
    assert across.get_segments()[1][:, 0].tolist() == pytest.approx([0.38, 0.42])
    assert [text.get_text() for text in first.texts] == ["0", "4", "0.5"]
    assert [text.xy for text in first.texts] == [(0.6, -2.0), (0.4, -1.0), (0.5, -1.5)]
    assert "cosine distance" in first.get_xlabel() and "features of CLIP" in first.get_xlabel()
    assert first.get_ylabel() == "E[log r], nats"
    pixels = files.imread(tmp_path / "curve.png")
    assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.05


def test_figures_of_samples(tmp_path):
    runs = several(tmp_path)
    (runs[1] / "posterior").mkdir()
    (runs[1] / "figure.png").write_bytes(b"png")
    main(Settings(runs, tmp_path / "out"))
    start = "shapes_clip_judge_beta"
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {f"{start}_{beta}.png" for beta in ("0_5", "1", "2")} | {
        *(f"{start}_0_5_run.png", "curve.png")
    }
    pixels = files.imread(tmp_path / "out" / f"{start}_1.png")[..., :3]
    for value in (0, 60):  # of the first method's images and of the second's
        assert (abs(pixels - value / 255).max(-1) < 1 / 255).mean() > 0.005


def test_without_betas_there_is_no_curve_and_without_images_no_picture(tmp_path):
    run = finished(tmp_path / "a", {"rtb": (-1.0, 0.4)})
    save_file({"x0": torch.zeros(3, 4, 2, 2)}, run / "rows" / "rtb.safetensors")
    main(Settings((run,), tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.png"))


def test_what_runs_of_a_method_differ_in_stands_beside_it(tmp_path):
    rtb = {"prior": (-2.0, 0.6), "rtb": (-1.0, 0.4)}
    rank = {**POSTERIOR, "lora_rank": 4}
    shorter = {**POSTERIOR, "finetune": {"updates": 60, "beta": 2.0}}
    runs = [
        finished(tmp_path / "a", rtb),
        finished(tmp_path / "b", rtb, posterior=rank),
        finished(tmp_path / "c", rtb, posterior=shorter, group_log_z=True),
        finished(tmp_path / "d", {"DDPO": (-1.0, 0.3)}, posterior=rank),
    ]
    _, groups = joined(runs)
    assert [*groups["shapes, clip:judge"][1.0]] == [
        *("prior", "rtb, updates 300", "rtb, lora_rank 4, updates 300"),
        *("rtb, group_log_z, updates 60", "DDPO"),
    ]


def test_settings_of_one_name_count_by_their_paths(tmp_path):
    """Of the start and of fine-tuning, of a mix and of the task; and an option of baselines."""

    def tuned(rate, prior=0):
        finetune = {"learning_rate": rate, "mix": {"prior": prior}}
        return {"finetune": finetune, "start": {"learning_rate": 3e-4, "draws": 1000}}

    rtb, ddpo = {"rtb": (-1.0, 0.4)}, {"DDPO": (-1.0, 0.3)}
    longer = tuned(4e-5)
    longer["start"]["draws"] = 2000
    runs = [
        finished(tmp_path / "a", rtb, posterior=tuned(4e-5)),
        finished(tmp_path / "b", rtb, posterior=tuned(1e-5), seed=1),
        finished(tmp_path / "c", rtb, posterior=tuned(1e-5, prior=1), seed=2),
        finished(tmp_path / "d", rtb, posterior=longer, seed=3),
        finished(tmp_path / "e", ddpo, posterior=tuned(4e-5), learning_rate=3e-4),
        finished(tmp_path / "f", ddpo, posterior=tuned(4e-5), learning_rate=1e-3, seed=1),
    ]
    _, groups = joined(runs)
    assert [*groups["shapes, clip:judge"][1.0]] == [
        "rtb, finetune.learning_rate 4e-05, prior 0, draws 1000",
        "rtb, finetune.learning_rate 1e-05, prior 0, draws 1000",
        "rtb, finetune.learning_rate 1e-05, prior 1, draws 1000",
        "rtb, finetune.learning_rate 4e-05, prior 0, draws 2000",
        *("DDPO, learning_rate 0.0003", "DDPO, learning_rate 0.001"),
    ]


def test_an_option_and_the_setting_it_makes_are_said_once(tmp_path):
    rtb, rank = {"rtb": (-1.0, 0.4)}, {**POSTERIOR, "lora_rank": 4}
    runs = [
        finished(tmp_path / "a", rtb, posterior=rank),
        finished(tmp_path / "b", rtb, posterior=rank, lora_rank=4, seed=1),
        finished(tmp_path / "c", rtb),
    ]
    _, groups = joined(runs)
    assert {name: len(line) for name, line in groups["shapes, clip:judge"][1.0].items()} == {
        **{"rtb, lora_rank 4": 2, "rtb": 1}
    }


def test_the_committed_rows_make_the_committed_table(tmp_path):
    kept = Path(__file__).parents[2] / "benchmarks" / "results" / "text_to_image"
    runs = defaultdict(list)
    for line in (kept / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        runs[row["run"]].append(row)
    for name, (first, *_) in runs.items():
        finished(
            tmp_path / name,
            {},
            budget={name: value for name, value in first["budget"].items() if name != "posterior"},
            posterior=first["budget"]["posterior"],
            sha=first["prior_sha256"],
            told={"methods": {row["method"]: row for row in runs[name]}, "beta": first["beta"]},
            **{key: first[key] for key in ("prior", "reward", "seed", "embedder")},
            prompts=list(first["prompts"]),
        )
    _, groups = joined([tmp_path / name for name in runs])
    assert tables(groups) == (kept / "table.md").read_text()


def test_two_priors_of_one_name_are_two_tables(tmp_path):
    methods = {"rtb": (-1.0, 0.4)}
    shas = ("0123456789", "abcdefghij")
    runs = [finished(tmp_path / sha, methods, sha=sha, prior_seed=i) for i, sha in enumerate(shas)]
    _, groups = joined(runs)
    assert list(groups) == [f"shapes, clip:judge, prior {sha[:8]}" for sha in shas]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"prompts": ["a circle"]}, r"prompts \['a shape'\] and \['a circle'\]"),
        ({"budget": {**BUDGET, "guidance": 7.5}}, r"guidance 2\.0 and 7\.5"),
        ({"budget": {**BUDGET, "levels": 50}}, "levels 20 and 50"),
        ({"ancestral": True}, "ancestral False and True"),
        ({"embedder": "clip"}, "embedder None and 'clip'"),
        ({}, "both hold 'rtb' of seed 0 at beta 1"),
        ({"program": "rtb_image"}, "is no run of rtb_text_to_image or text_to_image_baselines"),
    ],
)
def test_runs_that_do_not_go_together(other, words, tmp_path):
    methods = {"rtb": (-1.0, 0.4)}
    runs = (finished(tmp_path / "a", methods), finished(tmp_path / "b", methods, **other))
    with pytest.raises(InputError, match=words):
        main(Settings(runs, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_no_runs_and_unfinished_ones(tmp_path, capsys):
    with pytest.raises(InputError, match="no runs to make a table of"):
        main(Settings((), tmp_path / "out"))
    run = finished(tmp_path / "a", {"rtb": (-1.0, 0.4)})
    (run / "results.json").unlink()
    command = ["bench", "text_to_image_table", "--runs", str(run), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert "has no results.json; finish that run first" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
