"""Posteriors: each starts exactly as the prior, checkpointing changes no gradient, bad rewards are
refused before any work, and what is exported is what was trained."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from safetensors.torch import load_file
from torch import nn

from rtb_rl.adapters.pipelines import open_pipeline
from rtb_rl.core import rollout, rollout_against
from rtb_rl.errors import InputError, NonFiniteError
from rtb_rl.nn.convolution import ConvClassifier
from rtb_rl.tasks.image import posterior as image_posterior
from rtb_rl.tasks.image.measurements import Measurement, SuperResolution
from rtb_rl.tasks.image.posterior import fit_posterior, posterior_task
from rtb_rl.tasks.image.prior import PriorSettings, new_scheduler, new_unet
from rtb_rl.tasks.image.target import (
    class_target,
    every_class_target,
    measurement_target,
    reward_target,
)
from rtb_rl.tasks.image.trainers import PosteriorSettings
from rtb_rl.training import FinetuneSettings, Mix
from rtb_rl.training import posterior_stage as posteriors

SHAPE, LEVELS = (1, 8, 8), 5
TINY = PosteriorSettings(
    start=None,
    finetune=FinetuneSettings(
        updates=4, beta_warmup=1, conditions=8, mix=Mix(1, data=0), learning_rate=1e-3
    ),
    diagnostic_rows=2,
    diagnostic_samples=8,
    log_every=2,
    grid_every=2,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def new_prior(precision=None, unet=None):
    """An untrained one whose output is not zero."""
    settings = PriorSettings(widths=(8, 16), levels=LEVELS)
    unet = unet or new_unet(SHAPE, settings, generator=seeded())
    nn.init.normal_(unet.conv_out.weight, std=0.2, generator=seeded(1))
    pipeline = DDPMPipeline(unet, new_scheduler(LEVELS))
    prior = open_pipeline(pipeline, levels=LEVELS, precision=precision)
    prior.denoiser.requires_grad_(False).eval()
    return prior


def brightness(images, condition):
    return 4 * images.flatten(1).mean(1)


BRIGHT = reward_target("bright", brightness)


def target(name):
    classifier = ConvClassifier(SHAPE, 3, width=4, generator=seeded(2))
    draws = torch.rand((20, *SHAPE), generator=seeded(3)) * 2 - 1
    return {
        "copy": class_target(classifier, [1]),
        "lora": class_target(classifier, [0, 2]),
        "every class": every_class_target(classifier, 3),
        "measurement": measurement_target(Measurement(SuperResolution(2), 0.1), draws),
    }[name]


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["copy", "lora", "every class", "measurement"])
def test_a_posterior_starts_exactly_as_the_prior(name, precision):
    """For every class and every observation; with an output that depends on x and the level."""
    settings = replace(TINY, lora_rank=2) if name == "lora" else TINY
    prior, asked = new_prior(precision), target(name)
    task, unet = posterior_task(prior, asked, settings, seed=0)
    condition, _ = asked.draw_conditions(24, generator=seeded(4))
    if name == "every class":
        assert set(condition.tolist()) == {0, 1, 2}
    paths, ratio = rollout_against(
        task.diffusion, task.posterior, task.prior, condition, 24, generator=seeded(5)
    )
    assert ratio.eq(0).all(), float(ratio.abs().max())
    assert paths.x0.std(0).min() > 0.05
    assert any(p.requires_grad for p in unet.parameters())
    assert not any(p.requires_grad for p in prior.pipeline.unet.parameters())


@pytest.mark.parametrize("name", ["copy", "lora", "every class", "measurement"])
def test_conditions_and_weights_reach_the_posterior(name):
    """The log-ratio is zero at the start because nothing was learnt, not because nothing can be."""
    settings = replace(TINY, lora_rank=2) if name == "lora" else TINY
    asked = target(name)
    task, unet = posterior_task(new_prior(), asked, settings, seed=0)
    generator = seeded(6)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    condition, _ = asked.draw_conditions(6, generator=seeded(4))
    x = torch.randn((6, *SHAPE), generator=seeded(7))
    level = torch.full((6,), 3)
    with torch.no_grad():
        found = task.posterior(x, level, condition)
        assert not torch.allclose(found, task.prior(x, level, condition))
        if asked.is_conditional:
            other, _ = asked.draw_conditions(6, generator=seeded(8))
            assert not torch.allclose(found, task.posterior(x, level, other))


@pytest.mark.parametrize("rank", [None, 2])
def test_checkpointing_recomputes_and_gives_the_same_gradients(rank):
    gradients, calls = [], []
    for checkpointing in (False, True):
        settings = replace(TINY, lora_rank=rank, gradient_checkpointing=checkpointing)
        task, unet = posterior_task(new_prior(), target("copy"), settings, seed=0)
        unet.conv_norm_out.requires_grad_()  # lora's B is zero: give its A a gradient as well
        count = []
        unet.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_, n=count: n.append(1))
        x = torch.randn((4, *SHAPE), generator=seeded(9))
        task.posterior(x, torch.tensor([1, 2, 4, 5]), None).square().sum().backward()
        gradients.append({n: p.grad for n, p in unet.named_parameters() if p.grad is not None})
        calls.append(len(count))
    assert calls == [1, 2], "a block that is not recomputed saves no memory"
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 4
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_diagnostics_tell_the_truth_and_the_prior_stays(tmp_path):
    """log Z of a posterior that is barely trained is still log E_prior[r], within its error."""
    prior = new_prior()
    settings = replace(
        TINY,
        finetune=replace(TINY.finetune, learning_rate=1e-5),
        diagnostic_samples=200,
    )
    before = copy.deepcopy(prior.pipeline.unet.state_dict())
    told = fit_posterior(tmp_path, prior, BRIGHT, settings).results["diagnostics"]
    for name, value in prior.pipeline.unet.state_dict().items():
        assert value.equal(before[name]), "training moved the prior"
    x0 = prior.sampler.sample(None, 1000, generator=seeded(1))
    weight = BRIGHT.log_reward(x0, None).double()
    log_z = float(weight.exp().mean().log())
    error = math.hypot(
        told["log_z_standard_error"], float(weight.exp().std()) / 1000**0.5 / math.exp(log_z)
    )
    assert abs(told["log_z"] - log_z) < 4 * error < 0.1
    assert told["elbo"] <= told["log_z"]
    assert told["floored"] == 0


def test_network_calls_are_those_of_training_alone(tmp_path):
    """Grids for TensorBoard and diagnostics are not the method's price."""
    finetune = replace(TINY.finetune, levels_per_path=2)
    totals = [
        fit_posterior(
            tmp_path / str(every),
            new_prior(),
            BRIGHT,
            replace(TINY, finetune=finetune, grid_every=every),
        ).results["network_calls"]
        for every in (2, 1000)
    ]
    rows, updates = 8, 4
    paths, gradient = 2 * LEVELS * rows, 3 * 2 * rows
    compared = 2 * rows  # the prior at the steps that get a gradient
    assert totals[0] == totals[1]
    assert updates * (paths + gradient) <= totals[0] <= updates * (paths + gradient + compared)


def one_value(images, condition):
    return images.mean()


def not_a_number(images, condition):
    return torch.full((len(images),), torch.nan)


def too_good(images, condition):
    return torch.full((len(images),), torch.inf)


def a_list(images, condition):
    return [0.0] * len(images)


@pytest.mark.parametrize(
    "reward, error, words",
    [
        (one_value, InputError, r"'mine' returned \(\) for 2 points; return one number a point"),
        (a_list, InputError, r"returned list for 2 points"),
        (not_a_number, NonFiniteError, r"'mine' is nan at point 0.*return finite log r"),
        (too_good, NonFiniteError, r"'mine' is inf at point 0"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_reward_that_returns_something_else_is_refused(reward, error, words, tmp_path):
    with pytest.raises(error, match=words):
        fit_posterior(tmp_path / "out", new_prior(), reward_target("mine", reward), TINY)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 16, 16)])
def test_a_classifier_of_another_size_is_refused(shape, tmp_path):
    classifier = ConvClassifier(shape, 3, width=4, generator=seeded(2))
    for asked in (class_target(classifier, [1]), every_class_target(classifier, 3)):
        with pytest.raises(InputError, match=r"images of shape \(1, 8, 8\).*made for such images"):
            fit_posterior(tmp_path / "out", new_prior(), asked, TINY)
    assert not (tmp_path / "out").exists()


def test_adapters_where_there_is_no_place_for_them(tmp_path):
    settings = replace(TINY, lora_rank=2)
    down, up = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    channels = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}
    blocks = {"down_block_types": down, "up_block_types": up, "add_attention": False}
    plain = UNet2DModel(sample_size=8, norm_num_groups=4, **channels, **blocks)
    for name in ("every class", "measurement"):
        with pytest.raises(InputError, match="has conditions.*leave lora_rank out"):
            fit_posterior(tmp_path / "out", new_prior(), target(name), settings)
    with pytest.raises(InputError, match="has none; leave lora_rank out"):
        fit_posterior(tmp_path / "out", new_prior(unet=plain), target("copy"), settings)
    assert not (tmp_path / "out").exists()


def test_a_fit_is_continued_as_what_it_was_or_not_at_all(tmp_path, monkeypatch):
    prior = new_prior()
    first = fit_posterior(tmp_path, prior, BRIGHT, TINY)
    monkeypatch.setattr(posteriors, "train", lambda *a, **k: pytest.fail("trained again"))
    again = fit_posterior(tmp_path, prior, BRIGHT, TINY)
    assert again.results == first.results
    for one, other in zip(first.unet.parameters(), again.unet.parameters(), strict=True):
        assert one.equal(other)
    with pytest.raises(InputError, match="another configuration.*seed was 0 and is now 1"):
        fit_posterior(tmp_path, prior, BRIGHT, TINY, seed=1)
    with pytest.raises(InputError, match="target was 'bright' and is now 'dark'"):
        fit_posterior(tmp_path, prior, reward_target("dark", brightness), TINY)


def test_an_export_that_was_cut_short_is_made_up_for(tmp_path):
    settings = replace(TINY, lora_rank=2)
    fit_posterior(tmp_path, new_prior(), BRIGHT, settings)
    weights = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    whole = load_file(weights)
    weights.unlink()
    fit_posterior(tmp_path, new_prior(), BRIGHT, settings)
    again = load_file(weights)
    assert whole.keys() == again.keys()
    assert all(again[name].equal(value) for name, value in whole.items())


def test_a_posterior_of_every_class_walks_in_plain_diffusers_as_its_card_says(tmp_path):
    found = fit_posterior(tmp_path, new_prior(), target("every class"), TINY)
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert "pipeline.unet(x, t, class_labels=labels)" in card and "set_timesteps(5)" in card
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    labels = torch.tensor([0, 1, 2, 1])
    paths = rollout(found.task.diffusion, found.task.posterior, labels, 4, generator=seeded(5))
    generator = seeded(5)
    x = torch.randn(4, *SHAPE, generator=generator)
    pipeline.scheduler.set_timesteps(5)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps[:-1]:
            output = pipeline.unet(x, t, class_labels=labels).sample
            x = pipeline.scheduler.step(output, t, x, generator=generator).prev_sample
    torch.testing.assert_close(x, paths.x[1], rtol=1e-4, atol=1e-4)


def test_a_posterior_of_observations_says_how_it_is_called(tmp_path):
    asked = target("measurement")
    with pytest.raises(InputError, match="the mix has 1; give a mix of 2 paths or more"):
        fit_posterior(tmp_path, new_prior(), asked, TINY)
    settings = replace(TINY, finetune=replace(TINY.finetune, mix=Mix(1, data=1)))
    found = fit_posterior(tmp_path, new_prior(), asked, settings)
    assert "no observation" in (tmp_path / "pipeline" / "README.md").read_text()
    unet = UNet2DModel.from_pretrained(tmp_path / "pipeline", subfolder="unet").eval()
    condition, _ = asked.draw_conditions(3, generator=seeded(4))
    x = torch.randn((3, *SHAPE), generator=seeded(5))
    level = torch.full((3,), 2)
    with torch.no_grad():
        inner = found.task.posterior.network
        t = inner.timesteps[2]
        plain = unet(torch.cat([x, asked.encode(condition).channels], 1), t).sample
        assert plain.equal(inner(x, level, condition))


@pytest.mark.parametrize(
    "condition, paths", [(None, (1, 16)), (torch.zeros(1, 3), (2, 8))], ids=["alone", "conditions"]
)
def test_a_target_without_conditions_has_all_paths_of_the_diagnostics(
    monkeypatch, condition, paths
):
    monkeypatch.setattr(image_posterior, "diagnose", lambda task, denoiser, beta, **given: given)
    task = SimpleNamespace(
        posterior=nn.Linear(1, 1), draw_conditions=lambda n, generator: (condition, None)
    )
    given = image_posterior._diagnostics(task, TINY, seed=0)
    assert (given["rows"], given["samples"]) == paths
