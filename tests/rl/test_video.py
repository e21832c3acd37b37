"""A film has the episode's frames and tells its return."""

import os

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

from rtb_rl.errors import InputError
from rtb_rl.rl.data.behaviour import UniformPolicy
from rtb_rl.rl.episodes.evaluation import evaluate
from rtb_rl.rl.episodes.video import record_episode

POLICY = UniformPolicy(-torch.ones(3), torch.ones(3))


@pytest.mark.mujoco
def test_film_shows_the_episode_that_evaluate_counts(tmp_path, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    path = tmp_path / "new" / "film.gif"
    try:
        total = record_episode(POLICY, "Hopper-v5", path, seed=2)
    except InputError as error:
        if "cannot draw" in str(error):
            pytest.skip(str(error))
        raise
    assert "MUJOCO_GL" not in os.environ
    records = evaluate(POLICY, "Hopper-v5", episodes=1, seed=2)
    assert total == records.returns[0]
    film = imageio.imread(path)
    stride = 5  # 125 steps a second, 25 frames a second
    assert film.shape[0] == 1 + int(np.ceil(records.lengths[0] / stride))
    assert film.shape[-1] == 3 and film.std() > 0
    assert (film[0] != film[-1]).any()


@pytest.mark.mujoco
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_without_a_gl_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    pytest.importorskip("mujoco")  # before the setting, which would break its import
    monkeypatch.setenv("MUJOCO_GL", "none-such")
    with pytest.raises(InputError, match=r"cannot draw 'Hopper-v5' .* install a GL library"):
        record_episode(POLICY, "Hopper-v5", tmp_path / "film.gif", seed=0)
    assert not list(tmp_path.iterdir())


def test_other_types_of_film_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"'\.png'.*\.gif"):
        record_episode(POLICY, "Hopper-v5", tmp_path / "film.png", seed=0)


def test_environments_that_cannot_be_drawn_are_refused(tmp_path):
    with pytest.raises(InputError, match="unknown"):
        record_episode(POLICY, "Hoper-v5", tmp_path / "film.gif", seed=0)
