"""The start of a text-to-image posterior: draws keep their prompt, stages are kept."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_stable_diffusion import tiny_sd

from rtb_rl.adapters.text_to_image import open_text_to_image
from rtb_rl.core import log_ratio, rollout
from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image.posterior import fit_text_to_image
from rtb_rl.tasks.text_to_image.prompt_lists import prompt_list
from rtb_rl.tasks.text_to_image.reference import PriorDraws
from rtb_rl.tasks.text_to_image.start import PromptedDraws
from rtb_rl.tasks.text_to_image.target import PromptTarget, learned_log_z
from rtb_rl.tasks.text_to_image.trainers import TextToImagePosteriorSettings
from rtb_rl.training.mix import Mix
from rtb_rl.training.settings import FinetuneSettings
from rtb_rl.training.tilt import TiltSettings

LEVELS = 4
PROMPTS = ("a cat", "a dog", "a cow")
START = TiltSettings(draws=10, steps=4, batch=8)
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


def test_draws_keep_the_prompt_that_they_were_drawn_for():
    number = torch.arange(3.0)[:, None].expand(3, 5)
    x0 = number[..., None, None, None] * torch.ones(3, 5, 4, 2, 2)
    draws = PriorDraws(x0, 10 * number + torch.arange(5.0), 0.0)
    points, condition, log_reward, log_z = PromptedDraws(draws, 2.0)(
        200, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(points[:, 0, 0, 0], condition.float())
    assert torch.equal((log_reward / 10).floor(), condition.float())
    assert set(log_reward.tolist()) == set(draws.log_reward.flatten().tolist())
    wanted = (2 * draws.log_reward).logsumexp(1) - math.log(5)
    torch.testing.assert_close(log_z, wanted[condition])


def test_a_started_posterior_has_left_the_prior_and_its_stages_are_kept(tmp_path):
    found = fit(tmp_path)
    for stage in ("draws", "tilt"):
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
