"""Stages of a text-to-image job belong to one prior and one list of prompts, and say so."""

from dataclasses import replace

import pytest
import torch
from tiny_stable_diffusion import tiny_sd

from rtb_rl.adapters.text_to_image import open_text_to_image
from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image.posterior import fit_text_to_image
from rtb_rl.tasks.text_to_image.prompt_lists import PromptList
from rtb_rl.tasks.text_to_image.reference import drawn_once, prior_draws
from rtb_rl.tasks.text_to_image.target import PromptTarget
from rtb_rl.tasks.text_to_image.trainers import TextToImagePosteriorSettings
from rtb_rl.training.mix import Mix
from rtb_rl.training.run import Run
from rtb_rl.training.settings import FinetuneSettings

PROMPTS = PromptList(("a cat", "a dog"), ({"target": 1}, {"target": 2}))
SETTINGS = TextToImagePosteriorSettings(
    FinetuneSettings(updates=1, conditions=2, mix=Mix(1, data=0), levels_per_path=1, draw_batch=2),
    lora_rank=1,
    diagnostic_samples=2,
    log_every=1,
)
CHANGED = {
    "metadata": {"prompts": replace(PROMPTS, metadata=({"target": 1}, {"target": 3}))},
    "precision": {"precision": torch.bfloat16},
    "negative": {"negative": "bad"},
    "guidance": {"guidance": 3.0},
    "steps": {"last_std": 0.3},
    "latents": {"size": 24},
    "reward": {"name": "other"},
}


def brightness(images, prompts, metadata):
    return 5 * images.mean((1, 2, 3))


def opened(prompts=PROMPTS, name="bright", guidance=2.0, **given):
    """A prior of a tiny pipeline, and a target of its prompts."""
    prior = open_text_to_image(tiny_sd(), prompts.texts, levels=2, guidance=guidance, **given)
    return prior, PromptTarget(name, brightness, prompts)


def reference(directory, *opened):
    return prior_draws(directory, *opened, 3, batch=2, seed=0)


def posterior(directory, *opened):
    return fit_text_to_image(directory, *opened, SETTINGS)


@pytest.fixture(scope="module", params=[reference, posterior])
def stage(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("stage")
    request.param(directory, *opened())
    request.param(directory, *opened())  # the same again is no other configuration
    return request.param, directory


@pytest.mark.parametrize("what", CHANGED)
def test_a_stage_of_another_prior_or_list_is_refused(stage, what):
    make, directory = stage
    names = {"reward": "reward|target"}
    with pytest.raises(InputError, match=f"another configuration: .*({names.get(what, what)}) was"):
        make(directory, *opened(**CHANGED[what]))


def test_rows_are_drawn_once_for_every_prompt_in_turn(tmp_path):
    numbers, asked = torch.arange(3), []

    def draw(condition):
        asked.append(condition.tolist())
        return {"x": torch.stack([condition, condition**2], 1), "n": -condition}

    for _ in range(2):
        held, seconds = drawn_once(Run(tmp_path, {}), "kind", draw, numbers, 3, batch=4)
        assert held["x"].shape == (3, 3, 2) and seconds > 0
        assert torch.equal(held["n"], -numbers[:, None].expand(3, 3))
        assert torch.equal(held["x"][..., 1], held["n"] ** 2)
    assert asked == [[0, 0, 0, 1], [1, 1, 2, 2], [2]]
    assert (tmp_path / "kind.safetensors").exists()
