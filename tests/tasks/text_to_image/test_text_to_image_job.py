"""What an open job says of the pipeline that it was given."""

import sys
import warnings

import pytest
from tiny_stable_diffusion import tiny_sd

from rtb_rl.errors import InputError, NonFiniteError
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


REWARDS = """
import math, torch

def undefined():
    return lambda images, prompts, metadata: [
        math.nan if prompt == "nothing" else 0.0 for prompt in prompts
    ]

def unknown():
    known = {"cat": 1.0, "dog": 2.0}
    return lambda images, prompts, metadata: [
        known[prompt.split()[-1]] for prompt in prompts
    ]
"""


@pytest.mark.parametrize(
    ("make", "other", "error", "words"),
    [
        ("undefined", "nothing", NonFiniteError, "for the prompt 'nothing'"),
        ("unknown", "a bird", InputError, r"KeyError: 'bird'\) for the prompts '8 cat' to 'a dog'"),
    ],
)
def test_a_reward_is_tried_on_every_prompt_before_anything_is_made(
    pipeline, tmp_path, monkeypatch, make, other, error, words
):
    """Also on one between the first and the last of more prompts than are drawn at once."""
    (tmp_path / "rewards_by_prompt.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("rewards_by_prompt", None)
    prompts = (*(f"{number} cat" for number in range(9)), other, "a dog")
    settings = TextToImageSettings(
        prior=pipeline,
        prompts=prompts,
        reward=f"rewards_by_prompt:{make}",
        budget="smoke",
        out=tmp_path / "run",
    )
    with pytest.raises(error, match=words):
        open_text_to_image_job(settings, program="any")
    assert not (tmp_path / "run").exists()
