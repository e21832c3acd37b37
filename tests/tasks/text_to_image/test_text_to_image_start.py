"""The start of a text-to-image posterior: draws keep their prompt, stages are kept."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_stable_diffusion import tiny_sd

from rtb_rl.adapters.text_to_image import open_text_to_image
from rtb_rl.core import log_ratio, rollout
from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image.posterior import fit_text_to_image, text_to_image_task
from rtb_rl.tasks.text_to_image.prompt_lists import prompt_list
from rtb_rl.tasks.text_to_image.start import PromptedPaths, prior_paths
from rtb_rl.tasks.text_to_image.target import PromptTarget, learned_log_z
from rtb_rl.tasks.text_to_image.trainers import TextToImagePosteriorSettings
from rtb_rl.training.mix import Mix
from rtb_rl.training.settings import FinetuneSettings
from rtb_rl.training.tilt import TiltSettings

LEVELS = 4
PROMPTS = ("a cat", "a dog", "a cow")
START = TiltSettings(paths=10, steps=4, batch=8)
SETTINGS = TextToImagePosteriorSettings(
    FinetuneSettings(updates=2, conditions=4, mix=Mix(1, data=0), levels_per_path=2, draw_batch=5),
    lora_rank=None,
    start=START,
    diagnostic_samples=2,
    log_every=1,
    grid_every=2,
)


def brightness(images, prompts, metadata):
    return 5 * images.mean((1, 2, 3))


def fit(directory, settings=SETTINGS):
    prior = open_text_to_image(tiny_sd(), list(PROMPTS), levels=LEVELS, guidance=2.0)
    target = PromptTarget("bright", brightness, prompt_list(PROMPTS), learned_log_z)
    return fit_text_to_image(directory, prior, target, settings)


def test_a_step_keeps_its_path_and_its_prompt():
    """x holds level, prompt and number of the path in three coordinates."""
    level, prompt, path = torch.meshgrid(
        torch.arange(6.0), torch.arange(3.0), torch.arange(5.0), indexing="ij"
    )
    x = torch.stack([level, prompt, path], -1)
    log_reward = 10 * torch.arange(3.0)[:, None] + torch.arange(5.0)
    paths = PromptedPaths(x, log_reward, torch.tensor([7.0, 8.0, 9.0]))
    asked = torch.randint(1, 6, (300,), generator=torch.Generator().manual_seed(1))
    above, below, condition, ends, log_z = paths(asked, generator=torch.Generator().manual_seed(0))
    assert torch.equal(above[:, 0], asked.float()) and torch.equal(below[:, 0], asked - 1.0)
    assert torch.equal(above[:, 1:], below[:, 1:])
    assert torch.equal(above[:, 1], condition.float()) and torch.equal(log_z, condition + 7.0)
    assert torch.equal(ends, 10 * above[:, 1] + above[:, 2])
    assert len(ends.unique()) == 15


def test_log_z_is_that_of_each_prompt_s_paths(tmp_path):
    prior = open_text_to_image(tiny_sd(), list(PROMPTS), levels=LEVELS, guidance=2.0)
    target = PromptTarget("bright", brightness, prompt_list(PROMPTS), learned_log_z)
    task, _ = text_to_image_task(prior, target, SETTINGS, seed=0)
    paths = prior_paths(tmp_path, task, 3, 4, beta=2.0, batch=5, seed=0, facts={"a": 1})
    assert paths.x.shape == (LEVELS + 1, 3, 4, 4, 8, 8)
    numbers = torch.arange(3).repeat_interleave(4)
    ends = task.log_reward(paths.x[0].flatten(0, 1), numbers).reshape(3, 4)
    torch.testing.assert_close(paths.log_reward, ends)
    torch.testing.assert_close(paths.log_z, (2 * ends).logsumexp(1) - math.log(4))
    again = prior_paths(tmp_path, task, 3, 4, beta=2.0, batch=5, seed=0, facts={"a": 1})
    assert torch.equal(again.x, paths.x)
    with pytest.raises(InputError, match="another configuration: a was 1 and is now 2"):
        prior_paths(tmp_path, task, 3, 4, beta=2.0, batch=5, seed=0, facts={"a": 2})


def test_a_started_posterior_has_left_the_prior_and_its_stages_are_kept(tmp_path):
    found = fit(tmp_path)
    for stage in ("paths", "tilt"):
        assert (tmp_path / "start" / stage / "results.json").exists()
    assert found.results["start"]["network_calls"] == 12 * LEVELS + 4 * 8 * (1 + 3)
    condition = torch.tensor([0, 1, 2])
    task = found.task
    paths = rollout(
        task.diffusion, task.posterior, condition, 3, generator=torch.Generator().manual_seed(1)
    )
    assert (log_ratio(task.diffusion, task.posterior, task.prior, paths) != 0).all()


def test_a_start_and_a_learned_first_noise_don_t_go_together(tmp_path):
    with pytest.raises(InputError, match="don't go together"):
        fit(tmp_path, replace(SETTINGS, learned_start=True))
    assert not any(tmp_path.iterdir())
