"""The start of a text-to-image posterior: draws keep their prompt, stages are kept."""

from dataclasses import replace

import diffusers
import pytest
import torch
from tiny_stable_diffusion import tiny_sd

from rtb_rl.adapters.text_to_image import open_text_to_image
from rtb_rl.core import acting_network, log_ratio, rollout
from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image.posterior import fit_text_to_image
from rtb_rl.tasks.text_to_image.prompt_lists import prompt_list
from rtb_rl.tasks.text_to_image.reference import prior_draws
from rtb_rl.tasks.text_to_image.target import PromptTarget, learned_log_z
from rtb_rl.tasks.text_to_image.trainers import TextToImagePosteriorSettings
from rtb_rl.training.mix import Mix
from rtb_rl.training.rewarded import PROBES, RewardedSettings, RewardedTrainer
from rtb_rl.training.settings import FinetuneSettings

LEVELS = 4
USED = ("StableDiffusionPipeline", "UNet2DConditionModel", "DDIMScheduler")
PROMPTS = ("a cat", "a dog", "a cow")
START = RewardedSettings(draws=10, steps=4, batch=8, learning_rate=3e-3, open_limit=0.0)
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


def test_draws_of_the_start_are_of_every_prompt_and_not_those_of_the_reference(tmp_path):
    prior = open_text_to_image(tiny_sd(), list(PROMPTS), levels=LEVELS, guidance=2.0)
    target = PromptTarget("bright", brightness, prompt_list(PROMPTS), learned_log_z)
    given = {"batch": 5, "seed": 0}
    reference = prior_draws(tmp_path / "reference", prior, target, 4, **given)
    start = prior_draws(tmp_path / "start", prior, target, 4, **given, purpose="start")
    again = prior_draws(tmp_path / "start", prior, target, 4, **given, purpose="start")
    assert start.x0.shape == (3, 4, 4, 8, 8) and torch.equal(start.x0, again.x0)
    assert not torch.isclose(start.x0, reference.x0).any()
    with pytest.raises(InputError, match="another configuration"):
        prior_draws(tmp_path / "start", prior, target, 4, **given)


def test_a_started_posterior_has_left_the_prior_and_its_stages_are_kept(tmp_path):
    found = fit(tmp_path)
    for stage in ("draws", "denoiser"):
        assert (tmp_path / "start" / stage / "results.json").exists()
    calls = 12 * LEVELS + 12 + PROBES * LEVELS + 4 * 8 * (1 + 3)
    assert found.results["start"]["network_calls"] == calls
    condition = torch.tensor([0, 1, 2])
    task = found.task
    paths = rollout(
        task.diffusion, task.posterior, condition, 3, generator=torch.Generator().manual_seed(1)
    )
    assert (log_ratio(task.diffusion, task.posterior, task.prior, paths) != 0).all()


@pytest.mark.parametrize("rank", [None, 2])
def test_plain_diffusers_leaves_the_last_steps_to_the_prior_as_the_card_says(
    rank, tmp_path, monkeypatch
):
    """The latents of our paths, bit for bit the same when asked again; not those of the posterior
    at all steps, nor those of the prior.
    """
    monkeypatch.setattr(RewardedTrainer, "_settled_steps", lambda trainer: 2)
    tiny_sd().save_pretrained(tmp_path / "prior")
    found = fit(tmp_path / "run", replace(SETTINGS, lora_rank=rank))
    folder = tmp_path / "run" / ("lora" if rank else "pipeline")
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    code = code.replace("pipeline(PROMPT", "latents = pipeline(PROMPT").replace(
        "eta=1.0", 'eta=1.0, output_type="latent", generator=torch.Generator().manual_seed(1)'
    )
    names = {name: getattr(diffusers, name) for name in USED}
    names |= {"torch": torch, "PRIOR": tmp_path / "prior", "FOLDER": folder, "PROMPT": "a dog"}
    exec(code, names)
    again = code[code.index("latents =") :]
    drawn = names["latents"]
    exec(again, names)
    assert torch.equal(names["latents"], drawn)
    task, dog = found.task, torch.tensor([1])
    every = acting_network(task.posterior)
    ours, at_all_steps, of_prior = (
        rollout(task.diffusion, one, dog, 1, generator=torch.Generator().manual_seed(1)).x0
        for one in (task.posterior, every, task.prior)
    )
    off = [float((drawn - x0).abs().max()) for x0 in (ours, at_all_steps, of_prior)]
    assert off[0] < 1e-3 and min(off[1:]) > 5 * off[0]


def test_a_start_and_a_learned_first_noise_don_t_go_together(tmp_path):
    with pytest.raises(InputError, match="don't go together"):
        fit(tmp_path, replace(SETTINGS, learned_start=True))
    assert not any(tmp_path.iterdir())
