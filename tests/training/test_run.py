"""A run directory is continued only as what it was, and its records agree with each other."""

import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rtb_rl.errors import CheckpointError, InputError, NonFiniteError
from rtb_rl.training import GeneratorState, Run, train


def test_another_configuration_is_refused_naming_both_values(tmp_path):
    Run(tmp_path / "run", {"beta": 1.0, "seed": 0})
    Run(tmp_path / "run", {"beta": 1.0, "seed": 0})
    with pytest.raises(InputError, match=r"beta was 1.0 and is now 2.0.*another --out"):
        Run(tmp_path / "run", {"beta": 2.0, "seed": 0})


def test_a_directory_that_can_t_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"can't write the run directory.*another --out"):
        Run(tmp_path / "file" / "run", {})


def test_an_unreadable_config_is_one_clear_error(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        Run(tmp_path, {})


def test_manifest_says_what_the_run_was_made_with(tmp_path):
    run = Run(tmp_path, {"seed": 4, "data_sha256": "abc"})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["seed"] == 4 and manifest["data_sha256"] == "abc"
    assert manifest["versions"]["torch"] == torch.__version__
    assert Run(tmp_path, {"seed": 4, "data_sha256": "abc"}).id == run.id


def test_metrics_reach_json_lines_and_tensorboard_alike(tmp_path):
    run = Run(tmp_path, {})
    for step in (10, 20):
        run.log(step, {"a/loss": step / 3})
    run.finish({"done": True})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 10, "a/loss": 10 / 3}, {"step": 20, "a/loss": 20 / 3}]
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("a/loss")
    assert [(e.step, e.value) for e in events] == [
        (10, pytest.approx(10 / 3)),
        (20, pytest.approx(20 / 3)),
    ]


class Walk:
    """A random walk: its state after n updates depends on every draw."""

    def __init__(self, crash_at=None, bad_at=None):
        self.generator = torch.Generator().manual_seed(0)
        self.place = torch.zeros(3)
        self.crash_at, self.bad_at = crash_at, bad_at

    def update(self, step):
        if step == self.crash_at:
            raise KeyboardInterrupt
        self.place = self.place + torch.randn(3, generator=self.generator)
        return {"walk/place": math.nan if step == self.bad_at else self.place.sum()}

    @property
    def parts(self):
        return {"walk": self, "generator": GeneratorState(self.generator)}

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def run_walk(directory, walk):
    run = Run(directory, {})
    train(
        run,
        walk.update,
        walk.parts,
        steps=50,
        description="walk",
        log_every=5,
        checkpoint_every=20,
    )
    return walk.place, (directory / "metrics.jsonl").read_text()


@pytest.mark.parametrize("crash_at", [0, 3, 19, 20, 21, 39, 49])
def test_an_interrupted_loop_ends_like_one_that_was_not(tmp_path, crash_at):
    place, metrics = run_walk(tmp_path / "whole", Walk())
    with pytest.raises(KeyboardInterrupt):
        run_walk(tmp_path / "cut", Walk(crash_at=crash_at))
    resumed_place, resumed_metrics = run_walk(tmp_path / "cut", Walk())
    assert torch.equal(resumed_place, place)
    assert resumed_metrics == metrics


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_walk(tmp_path, Walk(crash_at=33))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 35, "walk/pl')
    _, metrics = run_walk(tmp_path, Walk())
    assert [json.loads(line)["step"] for line in metrics.splitlines()] == list(range(5, 51, 5))


def test_a_number_that_is_not_finite_stops_naming_step_term_and_last_good(tmp_path):
    with pytest.raises(NonFiniteError, match=r"walk/place is nan at step 29.*step_00000020"):
        run_walk(tmp_path, Walk(bad_at=29))


def test_an_update_that_stops_itself_names_the_last_good_checkpoint_too(tmp_path):
    walk = Walk()
    update = walk.update

    def failing(step):
        if step == 25:
            raise NonFiniteError("log_reward is nan at step 25")
        return update(step)

    walk.update = failing
    with pytest.raises(NonFiniteError, match=r"log_reward is nan at step 25.*step_00000020"):
        run_walk(tmp_path, walk)


def test_of_nested_settings_only_those_that_differ_are_named(tmp_path):
    old = {"settings": {"start": {"steps": 3, "batch": 8}, "beta": 1.0, "mix": [1, 2]}, "seed": 0}
    Run(tmp_path, old)
    new = {"settings": {"start": {"steps": 5, "batch": 8}, "beta": 1.0, "mix": [1, 3]}, "seed": 0}
    with pytest.raises(InputError) as refused:
        Run(tmp_path, new)
    said = str(refused.value)
    assert "settings.start.steps was 3 and is now 5" in said
    assert "settings.mix was [1, 2] and is now [1, 3]" in said
    assert "batch" not in said and "beta" not in said


def test_settings_that_came_or_went_are_named(tmp_path):
    Run(tmp_path, {"start": {"steps": 3}, "old": 1})
    with pytest.raises(InputError) as refused:
        Run(tmp_path, {"start": None, "new": {"a": 2}})
    said = str(refused.value)
    assert "start was {'steps': 3} and is now None" in said
    assert "old was 1 and is now not given" in said
    assert "new.a was not given and is now 2" in said


def test_an_option_that_came_later_and_is_left_out_changes_nothing(tmp_path):
    Run(tmp_path, {"seed": 0, "inner": {"a": 1}})
    Run(tmp_path, {"seed": 0, "inner": {"a": 1, "later": None}, "kl": None})
    Run(tmp_path, {"seed": 0, "inner": {"a": 1}})
    with pytest.raises(InputError, match=r"kl was not given and is now 0\.5"):
        Run(tmp_path, {"seed": 0, "inner": {"a": 1}, "kl": 0.5})


def test_an_empty_table_is_not_the_same_as_none(tmp_path):
    Run(tmp_path, {"own": {}})
    Run(tmp_path, {"own": {}})
    with pytest.raises(InputError, match=r"own was \{\} and is now not given"):
        Run(tmp_path, {})


def test_a_checkpoint_of_other_settings_is_one_clear_error(tmp_path):
    run = Run(tmp_path, {})
    walk = Walk()
    run.save(1, {"walk": walk})
    with pytest.raises(CheckpointError, match="step 1 .* has no 'generator'.*other settings"):
        run.restore(walk.parts)
