"""The start of an image posterior: draws meet every class, stages are kept and resumed exactly."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from test_image_posterior import BRIGHT, SHAPE, TINY, new_prior, seeded, target

from rtb_rl.core import rollout, steps_of_prior
from rtb_rl.errors import InputError
from rtb_rl.tasks.image import ImageSettings, open_image_job
from rtb_rl.tasks.image.posterior import fit_posterior
from rtb_rl.training import Mix
from rtb_rl.training import posterior_stage as posteriors
from rtb_rl.training import rewarded_stage as starts
from rtb_rl.training.rewarded import PROBES, RewardedSettings, RewardedTrainer

LEVELS = 5
START = RewardedSettings(draws=30, steps=6, batch=8, open_limit=0.0)


@pytest.mark.parametrize("name", ["copy", "lora", "every class"])
def test_a_started_posterior_can_be_told_from_the_prior_and_is_trained_on(name, tmp_path):
    settings = replace(TINY, start=START, lora_rank=2 if name == "lora" else None)
    fitted = fit_posterior(tmp_path, new_prior(), target(name), settings)
    found = fitted.results
    assert found["seconds"] > found["start"]["seconds"] > 0
    assert found["network_calls"] > found["start"]["network_calls"]
    if name == "copy":  # draws, all of them once for what is open at level 1, the noise of levels,
        calls = 30 * LEVELS + 30 + PROBES * LEVELS + 6 * 8 * (1 + 3)  # forward and backward passes
        assert found["start"]["network_calls"] == calls
    assert math.isfinite(found["diagnostics"]["elbo"])
    started = tmp_path / "start" / "denoiser" / "results.json"
    assert started.exists()


def test_classes_are_told_apart_by_the_start_alone(tmp_path):
    """The class embedding, zero before, differs between classes after it."""
    asked = target("every class")
    settings = replace(TINY, start=START, finetune=replace(TINY.finetune, updates=1))
    unet = fit_posterior(tmp_path, new_prior(), asked, settings).unet
    embedding = unet.class_embedding.weight.detach()
    assert asked.classes == len(embedding)
    assert float(embedding.std(0).min()) > 0


def test_conditions_without_number_are_refused(tmp_path):
    several = replace(
        TINY, start=START, finetune=replace(TINY.finetune, mix=Mix(on_policy=2, data=0))
    )
    with pytest.raises(InputError, match="has conditions without number"):
        fit_posterior(tmp_path, new_prior(), target("measurement"), several)
    assert not any(tmp_path.iterdir())


def leave_two_steps_to_the_prior(monkeypatch):
    monkeypatch.setattr(RewardedTrainer, "_settled_steps", lambda trainer: 2)


def test_plain_diffusers_leaves_the_last_steps_to_the_prior_as_the_card_says(tmp_path, monkeypatch):
    """The same path as ours; without what the card says it is another."""
    leave_two_steps_to_the_prior(monkeypatch)
    found = fit_posterior(tmp_path, new_prior(), BRIGHT, replace(TINY, start=START))
    assert steps_of_prior(found.task.posterior) == found.results["start"]["prior_steps"] == 2
    folder = tmp_path / "pipeline"
    card = (folder / "README.md").read_text()
    assert "Its last 2 steps are the prior's" in card
    pipeline = DDPMPipeline.from_pretrained(folder)
    without = last_state(pipeline)
    code = card.partition("```python\n")[2].partition("```")[0]
    exec(code, {"pipeline": pipeline, "FOLDER": folder, "UNet2DModel": UNet2DModel})
    task = found.task
    paths = rollout(task.diffusion, task.posterior, None, 3, generator=seeded(5))
    drawn = last_state(pipeline)
    torch.testing.assert_close(drawn, paths.x[1], rtol=1e-4, atol=1e-4)
    assert float((without - drawn).abs().max()) > 1e-3


def last_state(pipeline):
    """x at level 1 of three draws: the step after it has no noise in diffusers."""
    generator = seeded(5)
    x = torch.randn(3, *SHAPE, generator=generator)
    pipeline.scheduler.set_timesteps(LEVELS)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps[:-1]:
            x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x, generator=generator)
            x = x.prev_sample
    return x


@pytest.mark.parametrize("name", ["lora", "every class"])
def test_cards_of_other_posteriors_name_the_last_steps_too(name, tmp_path, monkeypatch):
    """And a second call of the same fit loads what the first had, its last steps included."""
    leave_two_steps_to_the_prior(monkeypatch)
    settings = replace(TINY, start=START, lora_rank=2 if name == "lora" else None)
    fit_posterior(tmp_path, new_prior(), target(name), settings)
    again = fit_posterior(tmp_path, new_prior(), target(name), settings)
    assert steps_of_prior(again.task.posterior) == 2
    card = (tmp_path / ("lora" if name == "lora" else "pipeline") / "README.md").read_text()
    how = "unet.disable_adapters()" if name == "lora" else "`prior(x, t)`"
    assert "Its last 2 steps are the prior's" in card and how in card


@pytest.mark.parametrize("interrupted", ["start", "posterior"])
def test_an_interrupted_start_ends_like_one_that_was_not(interrupted, tmp_path, monkeypatch):
    settings = replace(TINY, start=replace(START, open_limit=0.05))
    whole = fit_posterior(tmp_path / "whole", new_prior(), BRIGHT, settings)
    module = posteriors if interrupted == "posterior" else starts
    train = starts.train

    def stopped(run, update, parts, *, steps, description, **options):
        if description != interrupted:
            return train(run, update, parts, steps=steps, description=description, **options)
        options["checkpoint_every"] = 3
        train(run, update, parts, steps=3, description=description, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            fit_posterior(tmp_path / "parts", new_prior(), BRIGHT, settings)
    again = fit_posterior(tmp_path / "parts", new_prior(), BRIGHT, settings)
    for one, other in zip(whole.unet.parameters(), again.unet.parameters(), strict=True):
        assert one.equal(other)
    assert again.results["network_calls"] == whole.results["network_calls"]
    assert again.results["diagnostics"] == whole.results["diagnostics"]


def test_a_start_that_can_not_be_is_refused_before_the_prior_is_trained(tmp_path):
    settings = ImageSettings(budget="smoke", out=tmp_path)
    with pytest.raises(InputError, match="steps is 0; give 1 or more"):
        open_image_job(settings, program="any", start=RewardedSettings(steps=0))
    assert not list(tmp_path.iterdir())
