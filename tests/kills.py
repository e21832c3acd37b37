"""A stage that is killed between two checkpoints, for tests that it ends like one that was not."""

from contextlib import contextmanager

import pytest

from rtb_rl.training import Run, loop


def checkpoint_often(monkeypatch, *, log_every, checkpoint_every):
    """Stages whose loop has no settings of its own log and checkpoint every few steps."""
    often = dict(log_every=log_every, checkpoint_every=checkpoint_every)
    monkeypatch.setattr(loop.train, "__kwdefaults__", {**loop.train.__kwdefaults__, **often})


@contextmanager
def killed_at(monkeypatch, step):
    """The first checkpoint of this step is not written; what is inside must come to it."""
    save = Run.save

    def dies(run, at, parts):
        if at == step:
            raise KeyboardInterrupt
        save(run, at, parts)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            yield


def assert_same_stage(one, other):
    """Weights and metrics of two directories, byte for byte."""
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
