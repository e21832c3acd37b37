"""The language program runs whole, resumes exactly, refuses bad input before it works, and fills
gaps afterwards."""

import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_models import save_bert, save_gpt2, word_tokenizer
from rtb_rl.agents import rtb_language
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from rtb_rl import cli
from rtb_rl.errors import InputError, NonFiniteError
from rtb_rl.tasks.language import comparison, job, posterior, prior, reference
from rtb_rl.tasks.language import language_model_training as language_model
from rtb_rl.tasks.language.texts import load_texts
from rtb_rl.training import loop

METHODS = [
    "importance resampling",
    "prompt (x)",
    "prompt (x, y)",
    "best of 8",
    "SVDD",
    "FK steering",
    "autoregressive (x)",
    "DDPP-LB",
    "supervised",
    "RTB",
]
STAGES = ("prior", "reward", "judge", "reference", "posterior", "ddpp", "supervised")
TIMINGS = {"seconds", "training_seconds"}
STORIES = load_texts("grammar").stories
TEXTS = [" ".join(story) for story in STORIES[:300]]
FEW = ("best of 8",)
"""One method beside the posterior and the reference: the cheapest comparison."""


def run(out: Path, **given: Any) -> dict[str, Any]:
    """A run of the program; what it found."""
    rtb_language.main(rtb_language.Settings(out=out, budget="smoke", **given))
    return finished(out)


def finished(out: Path) -> dict[str, Any]:
    """The rows of results.json without timings."""
    rows = json.loads((out / "results.json").read_text())["methods"]
    return {name: {k: v for k, v in row.items() if k not in TIMINGS} for name, row in rows.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run of everything on the grammar; others share what it fitted."""
    out = tmp_path_factory.mktemp("language") / "whole"
    run(out)
    return out


def test_a_run_leaves_a_row_of_every_method(whole):
    rows = finished(whole)
    assert list(rows) == METHODS
    for name, row in rows.items():
        assert row["method"] == name and row["draws"] == 16
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert len(numbers) >= 12 and all(map(math.isfinite, numbers)), name
    trained = {name for name, row in rows.items() if row["training_calls"]}
    assert trained == {"DDPP-LB", "supervised", "RTB"}
    assert {name for name, row in rows.items() if row["log_z"] is not None} == {
        *trained,
        "importance resampling",
        "FK steering",
    }
    for name in trained:
        assert rows[name]["elbo"] <= rows[name]["log_z"] and 0.25 <= rows[name]["ess"] <= 1
    stages = [
        json.loads((whole / name / "results.json").read_text()) for name in ("posterior", "pool")
    ]
    calls = sum(stage["network_calls"] for stage in stages)
    assert rows["RTB"]["training_calls"] == calls


def test_a_run_leaves_a_table_and_stories(whole):
    lines = (whole / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in METHODS]
    row = finished(whole)["RTB"]
    assert f"{row['log_reward']:.3f} ± {row['log_reward_error']:.3f}" in lines[-1]
    stories = (whole / "stories.md").read_text()
    assert stories.count("**[...]**") == 4
    for name in ("human", *METHODS):
        assert stories.count(f"- *{name}*: ") == 4
    held = {" ".join(story[:3]) for story in STORIES}
    for line in stories.splitlines():
        if "**[...]**" in line:
            assert line.split(" **[...]** ")[0] in held


def test_the_stories_shown_are_not_those_trained_on(whole):
    """Nor do the prior and the reward share any."""
    parts, _ = job._stories(rtb_language.Settings())
    names = ("test", "prior", "reward")
    for one, other in ((names[0], names[1]), (names[0], names[2]), (names[1], names[2])):
        assert not set(parts[one]) & set(parts[other])
    shown = (whole / "stories.md").read_text()
    assert sum(story[3] in shown and " ".join(story[:3]) in shown for story in parts["test"]) >= 4


def texts_of(folder: Path) -> dict[str, list[tuple[int, str]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


def test_infills_and_stories_are_in_tensorboard(whole):
    (logged,) = texts_of(whole / "posterior").values()
    assert [step for step, _ in logged] == [2, 4]
    for _, text in logged:
        assert len(text.split("\n\n")) == posterior.SHOWN and text.count("**") == 8
    (stories,) = texts_of(whole).values()
    assert stories[-1][1] == (whole / "stories.md").read_text()
    scalars = EventAccumulator(str(whole / "posterior")).Reload().Tags()["scalars"]
    assert {"rtb/loss", "rtb/elbo", "rtb/log_z"} <= set(scalars)


def test_the_reference_is_what_the_prior_s_draws_weigh(whole):
    """E[log r] and log Z of results.json, from the file alone."""
    log_reward = load_file(whole / "reference" / "draws.safetensors")["log_reward"].double()
    assert log_reward.shape == (4, 8)
    log_z = log_reward.logsumexp(1) - math.log(8)
    row = finished(whole)["importance resampling"]
    assert row["log_z"] == pytest.approx(float(log_z.mean()), abs=1e-6)
    mean = (log_reward.softmax(1) * log_reward).sum(1).mean()
    assert row["log_reward"] - row["log_reward_gap"] == pytest.approx(float(mean), abs=1e-5)
    assert row["log_z_gap"] == 0


@pytest.fixture
def nothing_is_made(monkeypatch):
    """Training anything or measuring a method fails the test."""

    def fail(*arguments, **given):
        pytest.fail("this was made before")

    for module in (prior, language_model, posterior):
        monkeypatch.setattr(module, "train", fail)
    monkeypatch.setattr(reference, "importance_reference", fail)
    monkeypatch.setattr(comparison.Examiner, "examine", fail)


def test_a_second_call_makes_nothing_new(whole, nothing_is_made):
    before = finished(whole)
    table, stories = ((whole / name).read_bytes() for name in ("table.md", "stories.md"))
    assert run(whole) == before
    assert (whole / "table.md").read_bytes() == table
    assert (whole / "stories.md").read_bytes() == stories
    with pytest.raises(InputError, match="another configuration: .*seed was 0 and is now 1"):
        run(whole, seed=1)


@pytest.fixture(scope="module")
def adapted(whole) -> Path:
    """Another seed with adapters and another strength, which share the prior."""
    out = whole.with_name("adapted")
    run(out, share=whole, lora_rank=2, beta=0.5, seed=1, methods=FEW)
    return out


def test_a_run_may_share_prior_models_and_reference(whole, adapted):
    made = {path.name for path in adapted.iterdir() if path.is_dir()}
    assert made == {"posterior", "methods"}
    log_reward = load_file(whole / "reference" / "draws.safetensors")["log_reward"].double()
    rows = finished(adapted)
    assert list(rows) == ["importance resampling", *FEW, "RTB"]
    row = rows["importance resampling"]
    log_z = (0.5 * log_reward).logsumexp(1) - math.log(8)
    assert row["log_z"] == pytest.approx(float(log_z.mean()), abs=1e-6)
    # E[log r], not of beta log r
    mean = ((0.5 * log_reward).softmax(1) * log_reward).sum(1).mean()
    assert row["log_reward"] - row["log_reward_gap"] == pytest.approx(float(mean), abs=1e-5)
    weights = load_file(adapted / "posterior" / "model.safetensors")
    assert weights and all("lora_" in name or "gate" in name for name in weights)
    assert (adapted / "posterior" / "merged.safetensors").exists()


def test_what_was_fitted_for_something_else_is_not_shared(whole, adapted, tmp_path):
    """A reference holds the rewards of its own run."""
    out = tmp_path / "out"
    for given, words in (
        ({"hidden": 3}, "was run with hidden 4, and 3 is asked for"),
        ({"reward": "words:5"}, "was run with reward 'story', and 'words:5' is asked for"),
        ({"levels": 3}, "was run with levels None, and 3 is asked for"),
        ({"ends": True}, "was run with ends False, and True is asked for"),
        ({"prior_seed": 1}, "was run with data_sha256|prior_seed 0, and 1 is asked for"),
    ):
        with pytest.raises(InputError, match=words):
            run(out, share=whole, **given)
    with pytest.raises(InputError, match="shares what .*whole fitted; share that one"):
        run(out, share=adapted)
    unfinished = tmp_path / "unfinished"
    (unfinished / "prior").mkdir(parents=True)
    for nothing in (unfinished, tmp_path / "none"):
        with pytest.raises(InputError, match="holds no finished run of rtb_language; finish it"):
            run(out, share=nothing)
    assert not out.exists()


def test_a_gap_may_end_itself(tmp_path):
    rows = run(tmp_path / "ends", ends=True, methods=FEW)
    assert all(math.isfinite(row["perplexity"]) for row in rows.values())
    told = json.loads((tmp_path / "ends" / "posterior" / "infilling.json").read_text())
    assert told["frame"]["ends"] is True
    texts = infilled(tmp_path / "ends", "-n", "3")
    assert len(texts) == 3


def test_empty_texts_are_measured_too(tmp_path, monkeypatch):
    """A gap that ends itself may end at once."""

    def empty(self, x0, condition):
        return [self.gaps[row]._replace(middle="") for row in condition["row"].tolist()]

    monkeypatch.setattr(job.Prompts, "written", empty)
    rows = run(tmp_path / "empty", ends=True, methods=("prompt (x)",))
    assert rows["RTB"]["perplexity"] is None and rows["RTB"]["distinct_2"] is None


def test_a_tokenizer_of_byte_pairs(tmp_path):
    run(tmp_path / "pairs", byte_pairs=True, window=120, methods=FEW)
    tokenizer = json.loads((tmp_path / "pairs" / "posterior" / "tokenizer.json").read_text())
    assert tokenizer["model"]["type"] == "BPE"
    assert len(infilled(tmp_path / "pairs", "-n", "2")) == 2


def test_log_z_may_be_learned(whole, tmp_path):
    run(tmp_path / "learned", share=whole, learned_log_z=True, methods=FEW)
    one, other = (
        load_file(folder / "posterior" / "model.safetensors")
        for folder in (whole, tmp_path / "learned")
    )
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_reward_of_words_needs_no_language_model(whole, tmp_path):
    out = tmp_path / "words"
    rows = run(out, reward="contains:dog,race", hidden=5, methods=("DDPP-LB",))
    assert list(rows) == ["importance resampling", "DDPP-LB", "RTB"]
    assert not (out / "reward").exists()
    draws = load_file(out / "reference" / "draws.safetensors")["log_reward"]
    assert set(draws.flatten().tolist()) <= {0.0, -5.0, -10.0}
    with pytest.raises(InputError, match=r"no method 'autoregressive \(x\)'; there are importance"):
        run(tmp_path / "out", reward="words:5", methods=("autoregressive (x)",))


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return str(save_bert(tmp_path_factory.mktemp("bert") / "model", TEXTS, window=72))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    return str(save_gpt2(tmp_path_factory.mktemp("gpt2") / "model", TEXTS, window=256))


def test_prior_reward_and_judge_may_come_from_elsewhere(bert, gpt2, tmp_path):
    out = tmp_path / "hub"
    given = {"prior": bert, "reward_model": gpt2, "judge_model": gpt2}
    rows = run(out, **given, lora_rank=2, lora_targets=("query", "value"), methods=FEW)
    assert all(math.isfinite(row["log_reward"]) for row in rows.values())
    assert not any((out / name).exists() for name in ("prior", "reward", "judge"))
    assert len(infilled(out, "-n", "2")) == 2
    told = json.loads((out / "posterior" / "infilling.json").read_text())
    assert told["network"]["source"] == bert


def test_a_prior_from_elsewhere_may_end_its_gaps(bert, gpt2, tmp_path):
    """Its window holds the slots as well: stories that leave no room are left out."""
    given = {"prior": bert, "reward": "words:5", "judge_model": gpt2}
    run(tmp_path / "ends", **given, ends=True, methods=FEW)
    told = json.loads((tmp_path / "ends" / "posterior" / "infilling.json").read_text())["frame"]
    assert told["window"] <= 64 and told["ends"] is True
    assert len(infilled(tmp_path / "ends", "-n", "2")) == 2


def story_file(folder: Path, count: int, story: Any = None) -> str:
    path = folder / "stories.txt"
    lines = [" ".join(story or STORIES[i]) for i in range(count)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def reward_module(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "my_rewards").mkdir()
    (folder / "my_rewards" / "bad.py").write_text(
        textwrap.dedent("""
            import torch

            def nan():
                return lambda gaps: torch.full((len(gaps),), float("nan"))

            def scalar():
                return lambda gaps: torch.tensor(0.0)

            def listed():
                return lambda gaps: [0.0 for _ in gaps]
        """)
    )
    patch.syspath_prepend(folder)


def no_mask(folder: Path) -> str:
    """A BERT whose tokenizer has no mask."""
    save_bert(folder / "bert", TEXTS)
    word_tokenizer(TEXTS, mask_token=None).save_pretrained(folder / "bert")
    assert AutoTokenizer.from_pretrained(folder / "bert").mask_token_id is None
    return str(folder / "bert")


BAD: dict[str, tuple[Any, Any, str]] = {
    "no file": (lambda at: {"data": str(at / "none.txt")}, InputError, "no file of texts at"),
    "no stories": (
        lambda at: {"data": str(at / "a.pdf")},
        InputError,
        "can't be read from 'a.pdf'",
    ),
    "few stories": (
        lambda at: {"data": story_file(at, 30)},
        InputError,
        "fewer than 20; give more",
    ),
    "other lengths": (lambda at: {"sentences": 4}, InputError, "no story of exactly 4 sentences"),
    "first hidden": (
        lambda at: {"hidden": 1},
        InputError,
        "sentence 1 of 5 can't be hidden; give 2",
    ),
    "sixth hidden": (lambda at: {"hidden": 6}, InputError, "sentence 6 of 5 can't be hidden"),
    "last hidden": (lambda at: {"hidden": 5}, InputError, "nothing follows sentence 5 of 5"),
    "reward": (lambda at: {"reward": "happiness"}, InputError, "there is no reward 'happiness'"),
    "method": (lambda at: {"methods": ("PPO",)}, InputError, "no method 'PPO'; there are import"),
    "beta 0": (lambda at: {"beta": 0.0}, InputError, "beta is 0.0; give a positive number"),
    "beta < 0": (lambda at: {"beta": -1.0}, InputError, "beta is -1.0; give a positive number"),
    "mask": (lambda at: {"mask": 3}, InputError, "mask is given without prior"),
    "tokenizer": (lambda at: {"tokenizer": "gpt2"}, InputError, "tokenizer is given without prior"),
    "targets": (lambda at: {"lora_targets": ("q",)}, InputError, "is given without lora_rank"),
    "unread model": (
        lambda at: {"reward": "contains:dog", "reward_model": str(at)},
        InputError,
        "reward_model is given without reward story",
    ),
    "levels": (lambda at: {"levels": 0}, InputError, "levels is 0; give 1 or more"),
    "rank": (lambda at: {"lora_rank": 0}, InputError, "lora_rank is 0; give 1 or more"),
    "window": (
        lambda at: {"window": 20},
        InputError,
        "stories of at most 20 tokens are left for the",
    ),
    "no prior": (lambda at: {"prior": str(at)}, InputError, "no masked language model can be read"),
    "no mask": (lambda at: {"prior": no_mask(at)}, InputError, "checkpoint without mask token"),
    "small prior": (
        lambda at: {"prior": str(save_bert(at / "bert", TEXTS, window=40))},
        InputError,
        "reads 40 tokens, and the window is 64; make that smaller",
    ),
    "adapters": (
        lambda at: {"prior": str(save_bert(at / "bert", TEXTS)), "lora_rank": 2},
        InputError,
        "is named query_key_value or attended",
    ),
    "reward model": (lambda at: {"reward_model": str(at)}, InputError, "can be read from"),
    "judge model": (lambda at: {"judge_model": str(at)}, InputError, "can be read from"),
    "nan": (
        lambda at: {"reward": "my_rewards.bad:nan"},
        NonFiniteError,
        r"is \[nan, nan\] for two",
    ),
    "scalar": (
        lambda at: {"reward": "my_rewards.bad:scalar"},
        InputError,
        r"returned \(\) for 2 texts; return one number",
    ),
    "list": (
        lambda at: {"reward": "my_rewards.bad:listed"},
        InputError,
        "returned list for 2 texts",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_error_before_anything_is_written(name, tmp_path, monkeypatch):
    given, error, words = BAD[name]
    (tmp_path / "given").mkdir()
    reward_module(tmp_path / "given", monkeypatch)
    given = given(tmp_path / "given")
    with pytest.raises(error, match=words):
        run(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
    for module in [module for module in sys.modules if module.startswith("my_rewards")]:
        del sys.modules[module]


class Killer:
    """Lets a number of updates of one stage happen, then stands in for SIGKILL."""

    def __init__(self, train: Any, stage: str, updates: int):
        self.train, self.stage, self.updates = train, stage, updates

    def __call__(self, run: Any, update: Any, *arguments: Any, **given: Any) -> float:
        given |= {"checkpoint_every": 2}
        if run.directory.name != self.stage:
            return self.train(run, update, *arguments, **given)

        def stopped(step: int) -> Any:
            if step == self.updates:
                raise KeyboardInterrupt
            return update(step)

        return self.train(run, stopped, *arguments, **given)


def test_killed_in_every_stage_it_ends_with_the_same_results(whole, tmp_path, monkeypatch):
    """After three updates of each, of which two are in a checkpoint."""
    out, killed = tmp_path / "cut", []
    for stage in [name for name in STAGES if name != "reference"]:
        with monkeypatch.context() as patch:
            for module in (prior, language_model, posterior):
                patch.setattr(module, "train", Killer(loop.train, stage, 3))
            with pytest.raises(KeyboardInterrupt):
                run(out)
        checkpoints = [path.name for path in (out / stage / "checkpoints").iterdir()]
        assert checkpoints == ["step_00000002"], stage
        killed.append(stage)
        if stage == "judge":
            with monkeypatch.context() as patch:
                patch.setattr(reference, "importance_reference", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    run(out)
            assert not (out / "reference" / "results.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(comparison.Examiner, "examine", after(1, comparison.Examiner.examine))
        with pytest.raises(KeyboardInterrupt):
            run(out)
    assert not (out / "results.json").exists() and len(list((out / "methods").iterdir())) == 9
    assert run(out) == finished(whole)
    for stage in killed:
        for name in ("model.safetensors", "metrics.jsonl"):
            one, other = (side / stage / name for side in (whole, out))
            if stage != "prior" or name == "model.safetensors":  # it is too short to be logged
                assert one.read_bytes() == other.read_bytes(), f"{stage}/{name}"
    assert (out / "stories.md").read_text() == (whole / "stories.md").read_text()


def interrupted(*arguments, **given):
    raise KeyboardInterrupt


def after(calls: int, function: Any) -> Any:
    """The function, and an interruption once it was called so often."""
    seen = []

    def limited(*arguments, **given):
        if len(seen) == calls:
            raise KeyboardInterrupt
        seen.append(1)
        return function(*arguments, **given)

    return limited


LEFT, RIGHT = "Anna had a dog. It was her best friend.", "The dog was gone."


def infilled(out: Path, *more: str) -> list[str]:
    """What `rtb-rl infill` prints as JSON."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = cli.main(["infill", str(out), "--left", LEFT, "--right", RIGHT, "--json", *more])
    assert status == 0
    found = json.loads(printed.getvalue())
    assert (found["left"], found["right"]) == (LEFT, RIGHT)
    return found["infills"]


def test_infill_writes_texts_into_a_gap(whole, adapted, capsys):
    texts = infilled(whole, "-n", "4", "--length", "6", "--seed", "3")
    assert len(texts) == 4 and len(set(texts)) > 1
    assert texts == infilled(whole / "posterior", "-n", "4", "--length", "6", "--seed", "3")
    assert texts != infilled(whole, "-n", "4", "--length", "6", "--seed", "4")
    assert len(infilled(adapted)) == 5
    given = ["--left", LEFT, "--right", RIGHT, "-n", "4", "--length", "6", "--seed", "3"]
    assert cli.main(["infill", str(whole), *given]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{LEFT} [{text}] {RIGHT}" for text in texts]
    assert cli.main(["infill", str(whole), "--left", LEFT, "-n", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{LEFT} [") and line.endswith("]")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--left", ""], "no text before the gap|there is no text; give at least one"),
        (["--left", "Zebras yodel."], "has no known word"),
        (["--left", LEFT, "-n", "0"], "0 texts were asked for"),
        (["--left", LEFT, "--length", "99"], "a gap of 99 tokens is asked for"),
        (["--left", LEFT * 20], "the window"),
    ],
)
def test_infill_refuses_with_one_line_and_status_2(options, words, whole, capsys):
    assert cli.main(["infill", str(whole), *options]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert re.search(words, output.err), output.err


def test_infill_needs_a_run(tmp_path, capsys):
    assert cli.main(["infill", str(tmp_path), "--left", LEFT]) == 2
    assert "holds no posterior of texts" in capsys.readouterr().err
    (tmp_path / "posterior").mkdir()
    (tmp_path / "posterior" / "infilling.json").write_text("{")
    assert cli.main(["infill", str(tmp_path), "--left", LEFT]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_the_program_is_listed_and_without_the_extra_one_line_says_what_to_install():
    assert "rtb_language" in cli.programs("rtb_rl.agents")
    script = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from rtb_rl.cli import main; sys.exit(main(['run', 'rtb_language']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("rtb-rl: error:") and "pip install 'rtb-rl[language]'" in line


def command(out: Path) -> list[str]:
    options = ["--out", str(out), "--budget", "smoke"]
    return [str(Path(sys.executable).with_name("rtb-rl")), "run", "rtb_language", *options]


@pytest.mark.slow
def test_sigkill_in_each_stage_changes_nothing(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, killed = tmp_path / "cut", []
    for stage in STAGES:
        process = subprocess.Popen(
            command(out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ}
        )
        while not (out / stage / "config.json").exists():
            time.sleep(0.002)
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed.append(stage)
    subprocess.run(command(out), check=True, capture_output=True)
    assert killed == list(STAGES)
    assert finished(out) == finished(whole)
