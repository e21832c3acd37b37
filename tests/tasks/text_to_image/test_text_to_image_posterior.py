"""The path from a pipeline to its posterior: starts at the prior, resumes, loads in diffusers."""

import json
import math
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from tiny_stable_diffusion import tiny_scheduler, tiny_sd, tiny_sdxl

from rtb_rl.adapters.lora import lora_layers
from rtb_rl.adapters.text_to_image import load_text_to_image, open_text_to_image
from rtb_rl.baselines.trained import trained_methods
from rtb_rl.core import StartStep, log_ratio, rollout
from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image.posterior import fit_text_to_image, text_to_image_task
from rtb_rl.tasks.text_to_image.prompt_lists import prompt_list
from rtb_rl.tasks.text_to_image.target import (
    DrawPrompts,
    PromptTarget,
    group_log_z,
    learned_log_z,
)
from rtb_rl.tasks.text_to_image.trainers import (
    Baseline,
    TextToImagePosteriorSettings,
    nominal_beta,
    relative_trajectory_balance,
)
from rtb_rl.training import loop, posterior_stage
from rtb_rl.training.mix import Mix
from rtb_rl.training.settings import FinetuneSettings

PROMPTS = ("a red cat", "two dogs")
LEVELS, GUIDANCE = 5, 3.0
TINY = TextToImagePosteriorSettings(
    FinetuneSettings(
        updates=6,
        beta=2.0,
        beta_warmup=1,
        conditions=2,
        mix=Mix(on_policy=3, data=0),
        levels_per_path=3,
        draw_batch=4,
        chunk=4,
        learning_rate=5e-2,
    ),
    lora_rank=2,
    diagnostic_samples=4,
    log_every=2,
    grid_every=2,
)


def brightness(images, prompts, metadata):
    """More for the prompt with more letters, so that rewards depend on both."""
    scale = torch.tensor([float(len(text)) for text in prompts])
    return scale * images.mean((1, 2, 3))


def new_prior(make=tiny_sd, prompts=PROMPTS, **given):
    return open_text_to_image(
        make(**given), list(prompts), levels=LEVELS, guidance=GUIDANCE, decode_batch=3
    )


def new_target(reward=brightness, prompts=PROMPTS, make_log_z=group_log_z):
    return PromptTarget("bright", reward, prompt_list(prompts), make_log_z)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def fit(directory, settings=TINY, prior=None, **given):
    return fit_text_to_image(directory, prior or new_prior(), new_target(), settings, **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return directory, fit(directory)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("changed", [{}, {"lora_rank": None}, {"learned_start": True}])
def test_every_log_ratio_is_zero_at_first_and_the_loss_is_the_variance_of_beta_log_r(make, changed):
    prior, target, settings = new_prior(make), new_target(), replace(TINY, **changed)
    task, _ = text_to_image_task(prior, target, settings, seed=0)
    trainer = relative_trajectory_balance(
        task, target, prior.prompts, settings, seeded(), posterior_stage.Accelerator()
    )
    (drawn,) = trainer.paths.draw()
    ratio, log_reward = drawn.log_ratio, drawn.log_reward
    assert (ratio == 0).all() and len(ratio) == 6
    again = relative_trajectory_balance(
        task, target, prior.prompts, settings, seeded(), posterior_stage.Accelerator()
    )
    groups = 2.0 * log_reward.reshape(2, 3)
    expected = groups.var(1, correction=0).mean()
    assert expected > 0
    assert float(again.update(0)["rtb/loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_a_baseline_of_one_path_is_refused_by_its_sentence():
    """A group of one, with nothing to compare it with."""
    prior, target = new_prior(prompts=PROMPTS[:1]), new_target(prompts=PROMPTS[:1])
    finetune = replace(TINY.finetune, conditions=1, mix=Mix(on_policy=1, data=0))
    settings = replace(TINY, finetune=finetune)
    task, _ = text_to_image_task(prior, target, settings, seed=0)
    baseline = Baseline("DDPO", trained_methods()["DDPO"])
    given = (task, target, prior.prompts, settings, seeded(), posterior_stage.Accelerator())
    with pytest.raises(InputError, match="groups of one path"):
        baseline(*given).update(0)


def test_one_unet_in_memory():
    prior = new_prior()
    task, unet = text_to_image_task(prior, new_target(), TINY, seed=0)
    held = {p.data_ptr() for p in prior.pipeline.unet.parameters()}
    seen = {p.data_ptr() for p in task.posterior.parameters()}
    trained = {p.data_ptr() for p in task.posterior.parameters() if p.requires_grad}
    assert held < seen and seen - held == trained
    assert len(trained) == 2 * len(lora_layers(unet)) > 0
    assert all(not p.requires_grad for p in prior.pipeline.unet.parameters())


def test_the_exported_lora_gives_the_same_latents_in_plain_diffusers(whole):
    directory, posterior = whole
    plain = tiny_sd()
    before = plain(PROMPTS[0], **call(seeded(1))).images
    plain.load_lora_weights(directory / "lora")
    after = plain(PROMPTS[0], **call(seeded(1))).images
    assert (after - before).abs().max() > 0.01
    own = tiny_sd()
    own.register_modules(unet=posterior.unet)
    assert torch.equal(own(PROMPTS[0], **call(seeded(1))).images, after)
    condition = torch.zeros(1, dtype=torch.int64)
    x0 = rollout(
        posterior.task.diffusion, posterior.task.posterior, condition, 1, generator=seeded(1)
    ).x0
    torch.testing.assert_close(x0, after, atol=2e-3, rtol=1e-3)
    card = (directory / "lora" / "README.md").read_text()
    assert (
        "beta = 2" in card and "log Z between" in card and f"num_inference_steps={LEVELS}" in card
    )


@pytest.mark.parametrize("asked", [{}, {"negative": "ugly"}, {"size": 32}, {"size": (16, 32)}])
def test_the_card_asks_for_what_the_prior_was_opened_with(asked, tmp_path):
    """Its call gives the latents of our chain, of that size and away from the negative prompt."""
    tiny_sd().save_pretrained(tmp_path / "prior")
    prior = open_text_to_image(tiny_sd(), PROMPTS, levels=LEVELS, guidance=GUIDANCE, **asked)
    found = fit(tmp_path / "run", replace(TINY, finetune=replace(TINY.finetune, updates=1)), prior)
    folder = tmp_path / "run" / "lora"
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert "safety_checker=None" in code and ("height" in code) == ("size" in asked)
    code = code.replace("pipeline(PROMPT", "latents = pipeline(PROMPT").replace(
        "eta=1.0", 'eta=1.0, output_type="latent", generator=torch.Generator().manual_seed(1)'
    )
    names = {"PRIOR": tmp_path / "prior", "FOLDER": folder, "PROMPT": PROMPTS[0], "torch": torch}
    names |= {
        name: getattr(diffusers, name) for name in ("StableDiffusionPipeline", "DDIMScheduler")
    }
    exec(code, names)
    task, first = found.task, torch.zeros(1, dtype=torch.int64)
    ours = rollout(task.diffusion, task.posterior, first, 1, generator=seeded(1)).x0
    torch.testing.assert_close(names["latents"], ours, atol=2e-3, rtol=1e-3)


def call(generator):
    given = {"num_inference_steps": LEVELS, "eta": 1.0, "guidance_scale": GUIDANCE}
    return {**given, "generator": generator, "output_type": "latent"}


def test_a_fully_trained_unet_is_an_ordinary_pipeline(tmp_path):
    posterior = fit(tmp_path, replace(TINY, lora_rank=None))
    plain = load_text_to_image(tmp_path / "pipeline")
    plain.set_progress_bar_config(disable=True)
    own = tiny_sd()
    own.register_modules(unet=posterior.unet)
    found, expected = (p(PROMPTS[1], **call(seeded(2))).images for p in (plain, own))
    assert torch.equal(found, expected)


def test_a_killed_run_ends_like_one_that_was_not(whole, tmp_path, monkeypatch):
    directory, posterior = whole

    def stopped(run, update, parts, *, steps, **options):
        options["checkpoint_every"] = 3
        loop.train(run, update, parts, steps=4, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(posterior_stage, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path)
    assert not (tmp_path / "results.json").exists()
    again = fit(tmp_path)
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()
    assert again.results["network_calls"] == posterior.results["network_calls"]
    weights = load_file(tmp_path / "model.safetensors")
    assert weights and all(".lora_" in name for name in weights)
    with pytest.raises(InputError, match="seed was 0 and is now 1"):
        fit(tmp_path, seed=1)


def test_rewards_of_each_prompt_and_images_are_logged(whole):
    directory, _ = whole
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    shown = [line for line in lines if "reward/0 a red cat" in line]
    assert [line["step"] for line in shown] == [2, 4, 6]
    assert all(0 < line["reward/1 two dogs"] < len("two dogs") for line in shown)


def test_the_published_temperature_is_the_mean_over_dimensions():
    prior, target = new_prior(), new_target()
    settings = replace(TINY, per_dimension=True)
    task, unet = text_to_image_task(prior, target, settings, seed=0)
    dimensions = 4 * 8 * 8
    assert nominal_beta(settings, task.diffusion.event_shape) == 2.0 * dimensions
    for number, layer in enumerate(lora_layers(unet)):
        weight = layer.lora_B["default"].weight
        weight.data.normal_(std=0.1, generator=seeded(number))
    condition = torch.tensor([0, 1])
    paths = rollout(task.diffusion, task.posterior, condition, 2, generator=seeded())
    means = torch.zeros(2)
    for k in range(1, LEVELS + 1):
        level = torch.full((2,), k)
        one, other = (
            task.diffusion.kernel(d(paths.x[k], level, condition), paths.x[k], level)
            for d in (task.posterior, task.prior)
        )
        logs = [
            torch.distributions.Normal(step.mean, step.std).log_prob(paths.x[k - 1])
            for step in (one, other)
        ]
        means = means + (logs[0] - logs[1]).flatten(1).mean(1)
    log_reward = task.log_reward(paths.x0, condition)
    published = 0.7 + means - 2.0 * log_reward
    ratio = log_ratio(task.diffusion, task.posterior, task.prior, paths)
    ours = (
        0.7 * dimensions + ratio - nominal_beta(settings, task.diffusion.event_shape) * log_reward
    )
    torch.testing.assert_close(ours / dimensions, published, atol=1e-5, rtol=1e-4)


def test_the_learned_start_moves_and_is_exported(tmp_path):
    posterior = fit(tmp_path, replace(TINY, learned_start=True))
    assert isinstance(posterior.task.diffusion, StartStep)
    kept = load_file(tmp_path / "lora" / "start.safetensors")["start"]
    assert kept.shape == (2, 4, 8, 8) and kept.abs().max() > 0
    assert "latents=latents" in (tmp_path / "lora" / "README.md").read_text()
    assert posterior.task.diffusion.signal_left == 0 < posterior.prior.diffusion.signal_left


@pytest.mark.parametrize("name", list(trained_methods()))
def test_baselines_train_on_the_same_task(name, tmp_path):
    learning = trained_methods()[name]

    def smooth(images, prompts, metadata):
        return images.mean((1, 2, 3))

    smooth.differentiable = True
    target = new_target(smooth)
    posterior = fit_text_to_image(
        tmp_path, new_prior(), target, TINY, make_trainer=Baseline(name, learning)
    )
    assert posterior.results["network_calls"] > 0
    assert any((layer.lora_B["default"].weight != 0).any() for layer in lora_layers(posterior.unet))


def test_prompts_are_drawn_evenly():
    numbers, _ = DrawPrompts(3)(8, generator=seeded())
    assert sorted(torch.bincount(numbers).tolist()) == [2, 3, 3]
    assert sorted(DrawPrompts(5)(5, generator=seeded())[0].tolist()) == [0, 1, 2, 3, 4]


def test_log_z_of_prompts_starts_at_the_first_weights_and_learns_each():
    prior = new_prior()
    log_z = learned_log_z(prior.prompts, 1, seeded())
    weight, condition = torch.tensor([3.0, 5.0, 3.0, 5.0]), torch.tensor([0, 1, 0, 1])
    log_z.start_at(weight)
    assert torch.equal(log_z(condition, weight), torch.full((4,), 4.0))
    optimiser = torch.optim.Adam(log_z.parameters(), 1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        (log_z(condition, weight) - weight).square().mean().backward()
        optimiser.step()
    torch.testing.assert_close(log_z(condition, weight).detach(), weight, atol=0.02, rtol=0)
    with pytest.raises(InputError, match="2 paths or more"):
        group_log_z(prior.prompts, 1, seeded())


def test_a_target_and_a_prior_of_other_prompts(tmp_path):
    with pytest.raises(InputError, match="open it with those of the target"):
        fit_text_to_image(tmp_path / "out", new_prior(prompts=("x",)), new_target(), TINY)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda images, prompts, metadata: images.mean(), "one number an image"),
        (lambda images, prompts, metadata: torch.full((len(images),), math.nan), "nan"),
        (lambda images, prompts, metadata: images[:, 7].mean((1, 2)), "made for such images"),
    ],
)
def test_a_bad_reward_stops_before_anything_is_written(reward, words, tmp_path):
    with pytest.raises(Exception, match=words) as caught:
        fit_text_to_image(tmp_path / "out", new_prior(), new_target(reward), TINY)
    assert type(caught.value).__module__ == "rtb_rl.errors"
    assert not (tmp_path / "out").exists()


def test_an_unsupported_scheduler_is_named(tmp_path):
    from diffusers import PNDMScheduler

    with pytest.raises(InputError, match="PNDMScheduler"):
        new_prior(scheduler=PNDMScheduler.from_config(tiny_scheduler().config))
