"""A method is measured once, from its own generator; what rows say of weights and of training."""

import json
from types import SimpleNamespace

import pytest
import torch

from rtb_rl.training import Run, generator_for
from rtb_rl.training.kept_rows import KeptRows, of_reference, of_training


def test_a_method_is_measured_once_and_read_again(tmp_path, capsys):
    rows = KeptRows(Run(tmp_path / "run", {}))
    times = []

    def draw(generator):
        times.append(1)
        return torch.randn(3, generator=generator)

    def measure():
        rows.measure(
            "best of N",
            draw,
            lambda x, seconds: {"mean": float(x.mean()), "positive": seconds > 0},
            lambda x: {"x0": x[:2]},
            seed=4,
            device=torch.device("cpu"),
        )

    measure()
    measure()
    assert len(times) == 1
    expected = torch.randn(3, generator=generator_for(4, "best of N"))
    found, tensors = rows.read(["best of N"])
    assert torch.equal(tensors["best of N"]["x0"], expected[:2])
    row = {"method": "best of N", "mean": float(expected.mean()), "positive": True}
    assert found == {"best of N": row}
    rows.finish({"methods": found})
    assert json.loads((tmp_path / "run" / "results.json").read_text())["methods"] == found
    assert "results.json" in capsys.readouterr().out


def test_errors_of_several_references_are_those_of_their_mean():
    draws = [
        SimpleNamespace(log_z=torch.tensor(z), standard_error=torch.tensor(e), ess=torch.tensor(s))
        for z, e, s in ((-1.0, 0.3, 0.5), (-3.0, 0.4, 0.7))
    ]
    assert of_reference(draws) == pytest.approx(
        {"reference_log_z": -2.0, "reference_log_z_error": 0.25, "reference_ess": 0.6}
    )


def test_what_was_not_trained_has_no_log_z():
    assert of_training(None)["log_z"] is None and of_training(None)["training_calls"] == 0
