"""What another run spent, read from its files, and how many updates that pays for."""

import json

import pytest
import torch
from torch import nn

from rtb_rl.errors import InputError
from rtb_rl.training.equal_calls import Spent, spent_by, updates_within

CONFIG = {"program": "a_program", "target": "even", "beta": 2.0, "prompts": ["a cat"]}
ROW = {"training_calls": 1000, "draws": 50, "calls": 20}


def finished(folder, rows=None):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "results.json").write_text(json.dumps({"methods": {"rtb": ROW, **(rows or {})}}))
    return folder


def test_training_is_shared_among_the_draws(tmp_path):
    """1,000 calls of training for 50 draws are 20 a draw, and each took 20 more."""
    run = finished(tmp_path / "run")
    assert spent_by(run, "rtb", "a_program", {}) == Spent(training=1000, each=40.0)
    assert spent_by(run, "rtb", "a_program", CONFIG) == (1000, 40.0)


def test_a_run_that_is_not_there_not_finished_or_of_another_method(tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    run = finished(tmp_path / "run", {"prior": ROW})
    for folder, method in ((tmp_path / "none", "rtb"), (tmp_path / "begun", "rtb"), (run, "DDPO")):
        with pytest.raises(InputError, match="holds no finished run of a_program; finish it first"):
            spent_by(folder, method, "a_program", {})


@pytest.mark.parametrize(("name", "value"), [("target", "odd"), ("beta", 1.0), ("prompts", [])])
def test_a_run_that_was_asked_for_something_else(name, value, tmp_path):
    run = finished(tmp_path / "run")
    with pytest.raises(InputError, match=f"has {name} .*is asked for here; name a run of the same"):
        spent_by(run, "rtb", "a_program", {**CONFIG, name: value})


def test_a_run_of_another_program(tmp_path):
    run = finished(tmp_path / "run")
    with pytest.raises(InputError, match="is a run of a_program, not of another; name one"):
        spent_by(run, "rtb", "another", {})


class Trainer:
    """Each update draws `rows` without a gradient, and takes one of a single row."""

    parts: dict = {}
    average = None

    def __init__(self, network, rows):
        self.network, self.rows, self.steps = network, rows, []

    def update(self, step):
        self.steps.append(step)
        with torch.no_grad():
            self.network(torch.zeros(self.rows, 2))
        self.network(torch.zeros(1, 2)).sum().backward()
        return {}


@pytest.mark.parametrize(("calls", "updates"), [(100, 10), (104, 10), (106, 11), (96, 10), (1, 1)])
def test_updates_by_the_price_of_the_first(calls, updates):
    """Seven rows without a gradient and one with it, which counts three times, are 10 calls."""
    network, made = nn.Linear(2, 1), []

    def new_trainer():
        made.append(Trainer(network, 7))
        return made[-1]

    assert updates_within(calls, new_trainer, {network}) == updates
    assert [trainer.steps for trainer in made] == [[0]]
    assert not network._forward_pre_hooks  # counted no further
