"""The start of an image posterior: draws meet every class, stages are kept and resumed exactly."""

import math
from dataclasses import replace

import pytest
from test_image_posterior import BRIGHT, TINY, new_prior, target

from rtb_rl.errors import InputError
from rtb_rl.tasks.image.posterior import fit_posterior
from rtb_rl.training import Mix
from rtb_rl.training import posterior_stage as posteriors
from rtb_rl.training import rewarded_stage as starts
from rtb_rl.training.rewarded import PROBES, RewardedSettings

LEVELS = 5
START = RewardedSettings(draws=30, steps=6, batch=8)


@pytest.mark.parametrize("name", ["copy", "lora", "every class"])
def test_a_started_posterior_can_be_told_from_the_prior_and_is_trained_on(name, tmp_path):
    settings = replace(TINY, start=START, lora_rank=2 if name == "lora" else None)
    fitted = fit_posterior(tmp_path, new_prior(), target(name), settings)
    found = fitted.results
    assert found["seconds"] > found["start"]["seconds"] > 0
    assert found["network_calls"] > found["start"]["network_calls"]
    if name == "copy":  # draws, the noise of levels, and a forward and a backward pass a step
        calls = 30 * LEVELS + PROBES * LEVELS + 6 * 8 * (1 + 3)
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


@pytest.mark.parametrize("interrupted", ["start", "posterior"])
def test_an_interrupted_start_ends_like_one_that_was_not(interrupted, tmp_path, monkeypatch):
    settings = replace(TINY, start=START)
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
