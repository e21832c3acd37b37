"""The shapes' Stable Diffusion: its parts, its training, resuming, and plain diffusers."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from rtb_rl.adapters.schedulers import diffusion_from_scheduler, scheduler_grid
from rtb_rl.core import VelocityPrediction
from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image import shapes_autoencoder, shapes_prior
from rtb_rl.tasks.text_to_image.shapes import CELLS, WORDS, caption, draw_cells, draw_images
from rtb_rl.tasks.text_to_image.shapes_autoencoder import (
    AutoencoderSettings,
    AutoencoderTrainer,
    encode_world,
)
from rtb_rl.tasks.text_to_image.shapes_networks import (
    CaptionVelocity,
    new_autoencoder,
    new_scheduler,
    new_tokenizer,
    new_unet,
    token_ids,
    word_merges,
)
from rtb_rl.tasks.text_to_image.shapes_prior import (
    ShapesPriorSettings,
    fit_shapes_prior,
    new_shapes_pipeline,
)
from rtb_rl.training import PretrainSettings, loop

SETTINGS = ShapesPriorSettings(
    widths=(8, 16),
    text_width=8,
    images=60,
    autoencoder=AutoencoderSettings(widths=(8, 8), steps=5, batch=4),
    pretrain=PretrainSettings(steps=5, batch=4),
)
PARTS = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
    "unet": UNet2DConditionModel,
    "scheduler": DDIMScheduler,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(pipeline, prompts, **given):
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 5, "eta": 1.0, "guidance_scale": 2.0, **given}
    return pipeline(prompts, output_type="pt", generator=seeded(3), **given).images


def weights(pipeline):
    networks = (pipeline.vae, pipeline.text_encoder, pipeline.unet)
    return [p for network in networks for p in network.parameters()]


def same(one, other):
    return all(a.equal(b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shapes")
    before = torch.get_rng_state()
    pipeline = fit_shapes_prior(directory, SETTINGS)
    assert before.equal(torch.get_rng_state())  # nothing drew from the global generator
    return directory, pipeline


def test_every_word_is_a_token_and_comes_back():
    tokenizer = new_tokenizer()
    for word in WORDS:
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    texts = [caption(*cell) for cell in CELLS] + ["a shape", "a red shape", ""]
    ids = token_ids(tokenizer, texts)
    assert ids.shape == (15, 8) and ids.dtype == torch.int64
    assert len(ids.unique(dim=0)) == 15
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    assert bool((ids[:, 0] == tokenizer.bos_token_id).all())
    assert ids[-1, 1:].unique().tolist() == [tokenizer.eos_token_id]


def test_merges_of_words_with_the_same_letters_do_not_break_each_other():
    merges = word_merges(["red", "green", "greed", "reed"])
    assert len(merges) == len(set(merges))
    made = {"".join(pair) for pair in merges}
    assert {"red</w>", "green</w>", "greed</w>", "reed</w>"} <= made


def test_an_untrained_pipeline_takes_all_its_weights_from_the_generator():
    before = torch.get_rng_state()
    one, other, third = (new_shapes_pipeline(SETTINGS, generator=seeded(s)) for s in (0, 0, 1))
    assert before.equal(torch.get_rng_state())
    assert same(one, other)
    changed = [not a.equal(b) for a, b in zip(weights(one), weights(third), strict=True)]
    tables = [p.ndim > 1 and bool((p != 0).any()) for p in weights(one)]  # not norms, not conv_out
    assert all(c for c, table in zip(changed, tables, strict=True) if table)


def test_the_parts_are_the_real_ones_and_the_chain_reaches_noise():
    pipeline = new_shapes_pipeline(SETTINGS, generator=seeded())
    for name, kind in PARTS.items():
        assert type(getattr(pipeline, name)) is kind
    for levels in (20, 25):
        diffusion = diffusion_from_scheduler(new_scheduler(), (4, 8, 8), levels=levels)
        assert diffusion.signal_left < 0.01
        steps = scheduler_grid(new_scheduler(), levels).timesteps[1:].tolist()
        assert {b - a for a, b in pairwise(steps)} == {1000 // levels}  # as DDIM steps them


@pytest.mark.parametrize("levels", [1, 2, 4, 5, 10, 20, 25, 50, 100])
def test_no_step_of_plain_diffusers_is_undefined(levels):
    """Its DDIM takes a root of 1 - alpha - std^2, which rounding could make negative."""
    scheduler = new_scheduler()
    scheduler.set_timesteps(levels)
    x = torch.randn(1, 4, 8, 8, generator=seeded())
    for step in scheduler.timesteps:
        moved = scheduler.step(torch.zeros_like(x), step, x, eta=1.0, generator=seeded(1))
        x = moved.prev_sample
    assert bool(x.isfinite().all())


def test_the_latents_vary_by_one_after_scaling():
    autoencoder = new_autoencoder((8, 8), generator=seeded())
    latents = encode_world(autoencoder, 600, generator=seeded(1))
    x, cells = latents.sample(2000, generator=seeded(2))
    assert float((latents.scale * x).var()) == pytest.approx(1, rel=0.02)
    assert x.shape == (2000, 4, 8, 8) and cells.shape == (2000,)


def test_the_autoencoder_learns_to_give_images_back():
    settings = AutoencoderSettings(widths=(16, 16), steps=120, batch=16, learning_rate=3e-3)
    autoencoder = new_autoencoder(settings.widths, generator=seeded())
    trainer = AutoencoderTrainer(autoencoder, settings, generator=seeded(1))
    errors = [float(trainer.update(step)["autoencoder/squared_error"]) for step in range(120)]
    images = draw_images(draw_cells(500, generator=seeded(2)), generator=seeded(3))
    constant = float((2 * images).var(0).mean())  # the error of the mean image
    assert errors[0] > constant
    assert sum(errors[-5:]) / 5 < constant / 2


def test_the_network_is_told_what_the_pipeline_tells_it():
    """One guided step of plain diffusers is that of the denoiser that was trained."""
    pipeline = new_shapes_pipeline(SETTINGS, generator=seeded())
    torch.nn.init.normal_(pipeline.unet.conv_out.weight, generator=seeded(1))
    grid = scheduler_grid(pipeline.scheduler, 1)
    network = CaptionVelocity(pipeline.unet, pipeline.text_encoder, grid.timesteps)
    x, level = torch.randn(1, 4, 8, 8, generator=seeded(2)), torch.ones(1, dtype=torch.int64)
    with torch.no_grad():
        denoiser = VelocityPrediction(network, grid.schedule)
        ids = token_ids(pipeline.tokenizer, ["a red circle", ""])
        told, untold = (denoiser(x, level, row[None]) for row in ids)
    given = {"latents": x, "num_inference_steps": 1, "output_type": "latent"}
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline("a red circle", guidance_scale=2.0, **given).images
    torch.testing.assert_close(latents, untold + 2 * (told - untold), atol=1e-4, rtol=1e-4)


def test_a_finished_prior_is_not_trained_again(fitted, monkeypatch):
    directory, pipeline = fitted
    for module in (shapes_prior, shapes_autoencoder):
        monkeypatch.setattr(module, "train", lambda *a, **k: pytest.fail("trained again"))
    again = fit_shapes_prior(directory, SETTINGS)
    assert same(pipeline, again)
    assert not any(p.requires_grad for p in weights(again))
    with pytest.raises(InputError, match="seed was 0 and is now 1"):
        fit_shapes_prior(directory, SETTINGS, seed=1)
    with pytest.raises(InputError, match="another configuration"):
        fit_shapes_prior(directory, replace(SETTINGS, images=61))


@pytest.mark.parametrize(
    "trainer", [(shapes_autoencoder, "AutoencoderTrainer"), (shapes_prior, "Pretrainer")]
)
def test_a_stopped_prior_ends_like_one_that_was_not(fitted, tmp_path, monkeypatch, trainer):
    module, name = trainer
    update = getattr(module, name).update

    def stop(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return update(self, step)

    often = lambda *a, **k: loop.train(*a, **{**k, "checkpoint_every": 2})  # noqa: E731
    for one in (shapes_prior, shapes_autoencoder):
        monkeypatch.setattr(one, "train", often)
    with monkeypatch.context() as patch:
        patch.setattr(getattr(module, name), "update", stop)
        with pytest.raises(KeyboardInterrupt):
            fit_shapes_prior(tmp_path, SETTINGS)
    assert not (tmp_path / "pipeline").exists()
    assert same(fit_shapes_prior(tmp_path, SETTINGS), fitted[1])


def test_plain_diffusers_loads_it_and_draws_the_same(fitted):
    directory, pipeline = fitted
    loaded = StableDiffusionPipeline.from_pretrained(directory / "pipeline")
    assert same(pipeline, loaded)
    assert loaded.vae.config["scaling_factor"] == pipeline.vae.config["scaling_factor"] != 0.18215
    prompts = ["a red circle", "a shape"]
    images = drawn(pipeline, prompts)
    assert images.shape == (2, 3, 16, 16)
    assert images.equal(drawn(loaded, prompts))
    assert not images.equal(drawn(loaded, ["a blue square", "a shape"]))


def test_training_changed_every_network(fitted):
    _, pipeline = fitted
    untrained = new_shapes_pipeline(SETTINGS, generator=seeded())
    for name in ("vae", "text_encoder", "unet"):
        pairs = zip(
            getattr(pipeline, name).parameters(), getattr(untrained, name).parameters(), strict=True
        )
        assert any(not a.equal(b) for a, b in pairs)


def test_networks_of_another_depth_are_refused():
    with pytest.raises(InputError, match=r"two widths, not \(8,\)"):
        new_autoencoder((8,), generator=seeded())
    with pytest.raises(InputError, match=r"two widths, not \(8, 8, 8\)"):
        new_unet((8, 8, 8), 8, generator=seeded())
