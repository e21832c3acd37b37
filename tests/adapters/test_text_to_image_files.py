"""Pipelines that are read, those that are refused, and what plain diffusers makes of ours."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from tiny_stable_diffusion import LEVELS_OF_NOISE, tiny_scheduler, tiny_sd, tiny_sdxl
from torch import Tensor, nn

from rtb_rl.adapters.lora import add_lora, lora_layers, merged, shared_view
from rtb_rl.adapters.text_to_image import (
    ancestral_scheduler,
    load_text_to_image,
    open_text_to_image,
    posterior_denoiser,
)
from rtb_rl.adapters.text_to_image_export import save_lora_weights, save_pipeline_with
from rtb_rl.core import rollout
from rtb_rl.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:the schedule leaves signal")

MAKE = {"sd": tiny_sd, "sdxl": tiny_sdxl}
KINDS = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved pipeline of each kind, with a scheduler that is no chain, as published ones have."""
    folder = tmp_path_factory.mktemp("pipelines")
    pndm: Any = PNDMScheduler(**LEVELS_OF_NOISE, skip_prk_steps=True, steps_offset=1)
    for name, make in MAKE.items():
        make(scheduler=pndm).save_pretrained(folder / name)
    return {name: folder / name for name in MAKE}


def latents(pipeline: Any, unet: nn.Module | None = None) -> Tensor:
    """What plain diffusers draws at eta 1, with the pipeline's own U-Net or another."""
    pipeline.set_progress_bar_config(disable=True)
    held = pipeline.unet
    pipeline.register_modules(unet=unet or held)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "eta": 1.0}
    drawn = pipeline(["a red cat"], generator=seeded(3), output_type="latent", **settings).images
    pipeline.register_modules(unet=held)
    return drawn


def trained_adapters(pipeline: Any, **settings: Any) -> nn.Module:
    """A view of the U-Net with adapters after one step of a real loss."""
    prior = open_text_to_image(pipeline, ["a red cat"], levels=4, guidance=3.0)
    unet = add_lora(shared_view(pipeline.unet), rank=2, generator=seeded(0), **settings)
    posterior = posterior_denoiser(prior, unet)
    trained = [p for p in posterior.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=0.1)
    x, level = torch.randn((2, 4, 8, 8), generator=seeded(1)), torch.tensor([1, 3])
    for _ in range(2):
        optimiser.zero_grad()
        posterior(x, level, torch.zeros(2, dtype=torch.int64)).square().mean().backward()
        optimiser.step()
    assert all(p.abs().max() > 0.01 for p in trained)
    return unet


@pytest.mark.parametrize("name", MAKE)
def test_adapters_load_in_plain_diffusers(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The same latents bit for bit, at an alpha of its own, and near those of our rollout."""
    pipeline: Any = load_text_to_image(folders[name], ancestral=True)
    unet = trained_adapters(pipeline, alpha=6)
    save_lora_weights(tmp_path / "lora", pipeline, unet, card="# A card\n")
    files = {path.name for path in (tmp_path / "lora").iterdir()}
    assert files == {"pytorch_lora_weights.safetensors", "README.md"}
    assert (tmp_path / "lora" / "README.md").read_text() == "# A card\n"
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]

    plain: Any = KINDS[name].from_pretrained(folders[name])
    plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config, clip_sample=False)
    before = latents(plain)
    assert torch.equal(before, latents(pipeline))
    plain.load_lora_weights(tmp_path / "lora")
    after = latents(plain)
    assert torch.equal(after, latents(pipeline, unet))
    assert (after - before).abs().max() > 0.1
    prior = open_text_to_image(pipeline, ["a red cat"], levels=4, guidance=3.0)
    posterior, first = posterior_denoiser(prior, unet), torch.zeros(1, dtype=torch.int64)
    ours = rollout(prior.diffusion, posterior, first, 1, generator=seeded(3)).x0
    torch.testing.assert_close(ours, after, rtol=1e-4, atol=1e-3)
    assert torch.equal(latents(pipeline), before)


@pytest.mark.parametrize("name", MAKE)
def test_a_whole_pipeline_loads_in_plain_diffusers(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """With its new U-Net and the scheduler of the chain; the pipeline given stays as it was."""
    pipeline: Any = load_text_to_image(folders[name], ancestral=True)
    before, unet = latents(pipeline), trained_adapters(pipeline)
    with pytest.raises(InputError, match=r"save merged\(unet\)"):
        save_pipeline_with(tmp_path / "saved", pipeline, unet, card="")
    for card in ("one", "two"):
        save_pipeline_with(tmp_path / "saved", pipeline, merged(unet), card=card)
    assert (tmp_path / "saved" / "README.md").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    plain: Any = KINDS[name].from_pretrained(tmp_path / "saved")
    assert type(plain.scheduler) is DDIMScheduler
    assert torch.equal(latents(plain), latents(pipeline, merged(unet)))
    assert torch.equal(latents(pipeline), before)
    assert lora_layers(pipeline.unet) == []


def test_saving_replaces_its_own_kind_only(tmp_path: Path) -> None:
    pipeline = tiny_sd()
    plain = pipeline.unet
    unet = add_lora(shared_view(plain), rank=2, generator=seeded(0))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("years of work")
    with pytest.raises(InputError, match="exists and is no folder of LoRA weights"):
        save_lora_weights(tmp_path / "thesis", pipeline, unet, card="")
    with pytest.raises(InputError, match="exists and is no pipeline"):
        save_pipeline_with(tmp_path / "thesis", pipeline, plain, card="")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["text"]
    with pytest.raises(InputError, match="no LoRA layers to save"):
        save_lora_weights(tmp_path / "lora", pipeline, plain, card="")
    for card in ("one", "two"):
        save_lora_weights(tmp_path / "lora", pipeline, unet, card=card)
    assert (tmp_path / "lora" / "README.md").read_text() == "two"


def test_published_schedulers(folders: dict[str, Path]) -> None:
    """Refused with the cure; the one of the same levels of noise draws what DDIM draws."""
    published = load_text_to_image(folders["sd"])
    with pytest.raises(InputError, match=r"PNDMScheduler has no .*load_text_to_image\(source, anc"):
        open_text_to_image(published, ["a cat"], levels=4)
    ancestral = load_text_to_image(folders["sd"], ancestral=True)
    assert type(ancestral.scheduler) is DDIMScheduler
    assert not ancestral.scheduler.config["clip_sample"]
    noise = published.scheduler.alphas_cumprod
    assert torch.equal(ancestral.scheduler.alphas_cumprod, noise)
    prior = open_text_to_image(ancestral, ["a cat"], levels=4)
    assert prior.grid.timesteps.tolist() == [0, 1, 251, 501, 751]
    assert prior.diffusion.signal_left == pytest.approx(float(noise[751].sqrt()))


def test_schedulers_of_other_levels_have_no_ancestral_one() -> None:
    euler = EulerDiscreteScheduler(**LEVELS_OF_NOISE, prediction_type="v_prediction")
    assert ancestral_scheduler(euler).config["prediction_type"] == "v_prediction"
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler has no levels of noise"):
        ancestral_scheduler(FlowMatchEulerDiscreteScheduler())


def test_the_safety_checker_is_left_out(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of a pipeline that has one; its folder need not even be there."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_text_to_image(folders["sd"])
    load_text_to_image(folders["sd"]).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (tmp_path / "model_index.json").write_text(
        json.dumps(index | {"requires_safety_checker": True})
    )
    with pytest.warns(UserWarning, match="safety checker of .* is left out"):
        pipeline = load_text_to_image(tmp_path, dtype=torch.bfloat16)
    assert pipeline.components["safety_checker"] is None
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.bfloat16


def test_sources_without_a_pipeline(folders: dict[str, Path], tmp_path: Path) -> None:
    for source in (tmp_path / "nothing", tmp_path, "someone/some-model"):
        with pytest.raises(InputError, match="no diffusers pipeline can be read from .*save_pretr"):
            load_text_to_image(source)
    with pytest.raises(InputError, match="gone from the hub: use 'stable-diffusion-v1-5/stable"):
        load_text_to_image("runwayml/stable-diffusion-v1-5")
    for kind in ("StableDiffusionInpaintPipeline", "FluxPipeline", None):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        with pytest.raises(InputError, match=f"holds a {kind}.*StableDiffusionXLPipeline"):
            load_text_to_image(tmp_path)
    (tmp_path / "model_index.json").write_text((folders["sd"] / "model_index.json").read_text())
    with pytest.raises(InputError, match="no diffusers pipeline can be read from"):
        load_text_to_image(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"in_channels": 9}, "takes 9 channels, and a latent has 4: .*inpainting"),
        ({"out_channels": 8}, "returns 8 channels"),
        ({"num_class_embeds": 3}, "needs class labels"),
        ({"time_cond_proj_dim": 8}, "consistency models"),
        ({"addition_embed_type": "text"}, "addition_embed_type='text'.*gives None"),
        ({"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 16}, "another encoder"),
        ({"sample_size": None}, "no sample_size; give the size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unets_with_other_needs(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        open_text_to_image(tiny_sd(**config), ["a cat"], levels=4)


def test_other_refusals() -> None:
    pipeline: Any = tiny_sd()
    with pytest.raises(InputError, match="images of 15 x 15 pixels don't fit"):
        open_text_to_image(pipeline, ["a cat"], levels=4, size=15)
    with pytest.raises(InputError, match="guidance must be 1"):
        open_text_to_image(pipeline, ["a cat"], levels=4, guidance=0.5)
    unconditional: Any = DDPMPipeline(pipeline.unet, DDPMScheduler(clip_sample=False))
    with pytest.raises(InputError, match="DDPMPipeline is not one of StableDiffusionPipeline"):
        open_text_to_image(unconditional, ["a cat"], levels=4)
    clipped = tiny_sdxl(scheduler=DDIMScheduler(clip_sample=True))
    with pytest.raises(InputError, match="clip_sample=True"):
        open_text_to_image(clipped, ["a cat"], levels=4)
    silent = tiny_sd(
        scheduler=tiny_scheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    )
    with pytest.raises(InputError, match="leaves no signal"):
        open_text_to_image(silent, ["a cat"], levels=4)


@pytest.mark.parametrize(
    ("spacing", "levels", "warned"),
    [("leading", 7, False), ("trailing", 8, False), ("trailing", 7, True), ("linspace", 8, True)],
)
def test_steps_that_plain_diffusers_would_not_take(spacing: str, levels: int, warned: bool) -> None:
    """DDIMScheduler goes to t - T // K, which is another level than that of the next step."""
    scheduler = tiny_scheduler(timestep_spacing=spacing, set_alpha_to_one=True)
    pipeline = tiny_sd(scheduler=scheduler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_text_to_image(pipeline, ["a cat"], levels=levels)
    assert warned == any("plain diffusers does not step" in str(w.message) for w in caught)
