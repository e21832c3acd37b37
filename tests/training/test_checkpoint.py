"""Checkpoints are whole or absent, checked before use, and never run what they hold."""

import errno
import hashlib
import json
import pickle

import pytest
import torch
from torch import nn

from rtb_rl.errors import CheckpointError, NonFiniteError
from rtb_rl.training import checkpoint
from rtb_rl.training.checkpoint import load_checkpoint, save_checkpoint
from rtb_rl.training.seeding import GeneratorState


class Holder:
    """A part whose state is whatever it is given."""

    def __init__(self, state=None):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def refuse_warning(text):
    raise AssertionError(text)


def test_nested_state_comes_back_equal(tmp_path):
    state = {
        "tensor": torch.arange(6.0, dtype=torch.float64).reshape(2, 3),
        "numbers": [1, 2.5, None, True, "text"],
        0: {"integer keys": torch.tensor(3)},
        "pi": 0.1 + 0.2,
    }
    save_checkpoint(tmp_path, 7, {"part": Holder(state)})
    step, loaded = load_checkpoint(tmp_path, refuse_warning)
    assert step == 7
    back = loaded["part"]
    assert torch.equal(back["tensor"], state["tensor"]) and back["tensor"].dtype == torch.float64
    assert back["numbers"] == state["numbers"] and back["pi"] == state["pi"]
    assert int(back[0]["integer keys"]) == 3


def test_optimiser_and_generator_continue_bit_for_bit(tmp_path):
    def make():
        torch_generator = torch.Generator().manual_seed(3)
        layer = nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch_generator))
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True), torch_generator

    def steps(layer, optimiser, generator, count):
        for _ in range(count):
            optimiser.zero_grad()
            layer(torch.randn((4, 3), generator=generator)).square().mean().backward()
            optimiser.step()
        return layer.weight.detach().clone()

    whole = steps(*make(), 10)
    layer, optimiser, generator = make()
    steps(layer, optimiser, generator, 5)
    parts = {"layer": layer, "optimiser": optimiser, "generator": GeneratorState(generator)}
    save_checkpoint(tmp_path, 5, parts)
    layer, optimiser, generator = make()
    parts = {"layer": layer, "optimiser": optimiser, "generator": GeneratorState(generator)}
    _, states = load_checkpoint(tmp_path, refuse_warning)
    for name, part in parts.items():
        part.load_state_dict(states[name])
    assert torch.equal(steps(layer, optimiser, generator, 5), whole)


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, {"part": Holder({"step": step})}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def damage_truncate(path):
    file = path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def damage_flip(path):
    file = path / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def damage_json(path):
    (path / "state.json").write_text('{"step": 2, "par')


def damage_number(path):
    """Still JSON, of another number."""
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace("0.125", "0.625"))


def damage_missing(path):
    (path / "tensors.safetensors").unlink()


DAMAGES = [damage_truncate, damage_flip, damage_json, damage_number, damage_missing]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage):
    for step in (1, 2):
        state = {"x": torch.full((8,), float(step)), "rate": 0.125}
        save_checkpoint(tmp_path, step, {"part": Holder(state)})
    damage(tmp_path / "step_00000002")
    said = []
    step, states = load_checkpoint(tmp_path, said.append)
    assert step == 1 and float(states["part"]["x"][0]) == 1.0
    assert len(said) == 1 and "step_00000002" in said[0]


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    save_checkpoint(tmp_path, 1, {"part": Holder({"x": torch.zeros(2)})})
    damage_flip(tmp_path / "step_00000001")
    with pytest.raises(CheckpointError, match="remove that directory"):
        load_checkpoint(tmp_path, lambda text: None)


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_checkpoint_made_to_execute_code_is_refused(tmp_path):
    marker = tmp_path / "executed"
    place = tmp_path / "checkpoints"
    save_checkpoint(place, 1, {"part": Holder({"x": torch.zeros(2)})})
    bomb = pickle.dumps(Bomb(marker))
    file = place / "step_00000001" / "state.json"
    record = json.loads(file.read_text())
    record["sha256"] = hashlib.sha256(bomb).hexdigest()
    file.write_text(json.dumps(record))
    (place / "step_00000001" / "tensors.safetensors").write_bytes(bomb)
    with pytest.raises(CheckpointError):
        load_checkpoint(place, lambda text: None)
    assert not marker.exists()
    pickle.loads(bomb).close()
    assert marker.exists()  # the bomb was a real one


def test_a_full_disk_is_one_error_that_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"part": Holder({"x": torch.zeros(2)})})

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_durably", full)
    with pytest.raises(CheckpointError, match="No space left.*step_00000001"):
        save_checkpoint(tmp_path, 2, {"part": Holder({"x": torch.ones(2)})})
    assert load_checkpoint(tmp_path, refuse_warning)[0] == 1


def test_a_write_cut_short_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"part": Holder({"x": torch.zeros(2)})})
    real = checkpoint.write_durably

    def killed(path, data):
        if path.name == "state.json":
            raise KeyboardInterrupt
        real(path, data[: len(data) // 2])

    monkeypatch.setattr(checkpoint, "write_durably", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, {"part": Holder({"x": torch.ones(2)})})
    monkeypatch.undo()
    assert load_checkpoint(tmp_path, refuse_warning)[0] == 1
    save_checkpoint(tmp_path, 2, {"part": Holder({"x": torch.ones(2)})})
    assert load_checkpoint(tmp_path, refuse_warning)[0] == 2


def test_what_can_t_be_stored_is_named(tmp_path):
    with pytest.raises(TypeError, match="part/bad is a set"):
        save_checkpoint(tmp_path, 1, {"part": Holder({"bad": {1, 2}})})


def test_a_state_with_nan_is_not_kept(tmp_path):
    save_checkpoint(tmp_path, 1, {"part": Holder({"x": torch.zeros(2)})})
    with pytest.raises(NonFiniteError, match=r"part/x holds NaN after step 2.*step_00000001"):
        save_checkpoint(tmp_path, 2, {"part": Holder({"x": torch.tensor([0.0, torch.nan])})})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
