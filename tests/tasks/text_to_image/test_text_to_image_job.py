"""What an open job says of the pipeline that it was given."""

import warnings

import pytest
from tiny_stable_diffusion import tiny_sd

from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image import TextToImageSettings, open_text_to_image_job
from rtb_rl.training.rewarded import RewardedSettings


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "sd"
    tiny_sd().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("learned", [False, True])
def test_signal_at_the_last_level_is_said_once(pipeline, tmp_path, learned, capsys):
    """With the flag that helps; not where that is chosen."""
    settings = TextToImageSettings(
        prior=pipeline, prompts=("a cat",), reward="compressible", budget="smoke", out=tmp_path
    )
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        open_text_to_image_job(settings, program="any", learned_start=learned)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("is left at the last level") == said.count("--learned-start") == 1 - learned
    assert not any("signal" in str(one.message) for one in warned)


def test_numbers_that_train_away_from_the_target_are_refused_first(pipeline, tmp_path):
    settings = TextToImageSettings(
        prior=pipeline, prompts=("a cat",), reward="compressible", budget="smoke", out=tmp_path
    )
    for changed, words in (
        ({"finetune": {"gradient_clip": -1.0}}, "gradient_clip is -1.0"),
        ({"start": RewardedSettings(steps=0)}, "steps is 0"),
    ):
        with pytest.raises(InputError, match=words):
            open_text_to_image_job(settings, program="any", **changed)
    assert not list(tmp_path.iterdir())
