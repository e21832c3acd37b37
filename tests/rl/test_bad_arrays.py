"""Data that don't fit, and next observations that nobody recorded."""

import numpy as np
import pytest

from rtb_rl.errors import InputError
from rtb_rl.rl import (
    DiffusionQSettings,
    EnergyGuidanceSettings,
    SoftCriticSettings,
    TD3BCSettings,
    load_dataset,
)
from rtb_rl.rl.jobs.saved import load_policy


def recorded(rows=40, every=10, **changes):
    random = np.random.default_rng(0)
    observations = random.normal(size=(rows, 2)).astype(np.float32)
    arrays = dict(
        observations=observations,
        actions=random.uniform(-1, 1, (rows, 3)).astype(np.float32),
        rewards=random.normal(size=rows).astype(np.float32),
        terminals=np.zeros(rows, bool),
        timeouts=np.arange(rows) % every == every - 1,
    )
    return arrays | changes


def test_next_observations_that_were_made_by_shifting_rows_say_nothing_of_the_ends():
    """A cut row got the start of the next episode, and the last row that of the first."""
    arrays = recorded()
    shifted = np.roll(arrays["observations"], -1, axis=0)
    data = load_dataset({**arrays, "next_observations": shifted})
    assert len(data) == 36 and any("4 of 40 transitions dropped" in note for note in data.notes)
    terminal = {"terminals": arrays["timeouts"], "timeouts": arrays["terminals"]}
    assert len(load_dataset({**arrays, **terminal, "next_observations": shifted})) == 40
    true = shifted.copy()
    true[9::10] += 1
    assert len(load_dataset({**arrays, "next_observations": true})) == 40
    true[9] = shifted[9]  # one episode that begins where another was cut proves nothing
    assert len(load_dataset({**arrays, "next_observations": true})) == 40


def test_a_single_number_for_all_rewards():
    with pytest.raises(InputError, match=r"'rewards' has shape \(\); give one value a row"):
        load_dataset(recorded(rewards=np.float32(1.0)))


def test_an_environment_of_other_actions_is_named(tmp_path):
    np.savez(tmp_path / "mine.npz", **recorded())
    with pytest.raises(InputError, match="box has 6 coordinates, the data's actions 3; name the"):
        load_dataset(tmp_path / "mine.npz", env_id="HalfCheetah-v5")


def test_an_npy_file_of_the_name_npz(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(InputError, match="whole npz file of numbers .it holds one array"):
        load_dataset(tmp_path / "a.npz")


def test_a_method_that_the_run_has_not_fitted(tmp_path):
    (tmp_path / "config.json").write_text('{"settings": {}, "method": "rtb"}')
    with pytest.raises(InputError, match="qgpo holds no fitted stage"):
        load_policy(tmp_path, "qgpo")


@pytest.mark.parametrize(
    "make",
    [
        lambda: TD3BCSettings(steps=-5),
        lambda: TD3BCSettings(batch=0),
        lambda: DiffusionQSettings(steps=0),
        lambda: EnergyGuidanceSettings(steps=0),
        lambda: EnergyGuidanceSettings(rows=0),
        lambda: SoftCriticSettings(rows=-1),
    ],
)
def test_no_steps_no_rows_no_batch_are_refused(make):
    with pytest.raises(InputError, match=r"(steps|batch|rows)=(-5|0|-1)"):
        make()
