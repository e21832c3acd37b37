"""Pipelines and U-Nets: the samples of plain diffusers, and networks that start as the prior."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from rtb_rl.adapters.pipelines import load_pipeline, open_pipeline, save_pipeline
from rtb_rl.adapters.schedulers import scheduler_grid
from rtb_rl.adapters.unets import (
    UNetDenoiser,
    UNetInputs,
    with_channels,
    with_classes,
)
from rtb_rl.core import log_ratio, rollout
from rtb_rl.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:the schedule leaves signal")

NEW_UNET = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_unet(seed: int = 0, **config: Any) -> UNet2DModel:
    """A small U-Net with an attention block and weights from the seed."""
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    blocks = {"down_block_types": down, "up_block_types": up, "block_out_channels": (8, 16)}
    unet = UNet2DModel(**{**NEW_UNET, **blocks, "attention_head_dim": 8, **config}).eval()
    generator = seeded(seed)
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, std=fan_in**-0.5, generator=generator)
    for module in unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return unet


def plain_samples(folder: Path, batch: int, levels: int, seed: int) -> Tensor:
    """What plain diffusers draws from a saved folder, images in [0, 1] of [batch, C, H, W]."""
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=batch, num_inference_steps=levels, generator=seeded(seed), output_type="np"
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(clip_sample=False, prediction_type="sample"),
        DDPMScheduler(clip_sample=False, variance_type="fixed_large", beta_end=0.005),
        DDPMScheduler(
            clip_sample=False,
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            prediction_type="v_prediction",
        ),
        DDIMScheduler(
            clip_sample=False, timestep_spacing="linspace", prediction_type="v_prediction"
        ),
    ],
    ids=["small", "large", "zero terminal signal", "ddim"],
)
def test_saved_pipeline_draws_our_samples(scheduler: Any, tmp_path: Path) -> None:
    """Plain diffusers walks our path, and decodes level 1 to the mean of our last step."""
    levels = 8
    save_pipeline(tmp_path / "saved", new_unet(), scheduler, card="# A card\n")
    assert (tmp_path / "saved" / "README.md").read_text() == "# A card\n"
    prior = open_pipeline(load_pipeline(tmp_path / "saved"), levels=levels)
    path = rollout(prior.diffusion, prior.denoiser, None, 3, generator=seeded(5))
    one = torch.ones(3, dtype=torch.int64)
    with torch.no_grad():
        last = prior.diffusion.kernel(prior.denoiser(path.x[1], one, None), path.x[1], one)
    ours = (last.mean / 2 + 0.5).clamp(0, 1)
    plain = plain_samples(tmp_path / "saved", 3, levels, 5)
    assert ((plain > 0) & (plain < 1)).float().mean() > 0.1
    assert (ours - plain).abs().max() < 1e-4
    drawn = (prior.sampler.sample(None, 3, generator=seeded(5)) / 2 + 0.5).clamp(0, 1)
    noise = float(prior.diffusion.std[1].flatten()[0]) / 2
    assert (drawn - plain).abs().max() < 5 * noise


def test_saved_noise_of_a_last_step_that_has_some(tmp_path: Path) -> None:
    """fixed_large with trailing timesteps: diffusers adds noise there too, and samples agree."""
    scheduler = DDPMScheduler(
        clip_sample=False,
        variance_type="fixed_large",
        timestep_spacing="trailing",
        prediction_type="sample",
    )
    save_pipeline(tmp_path / "saved", new_unet(), scheduler, card="")
    prior = open_pipeline(load_pipeline(tmp_path / "saved"), levels=8)
    ours = (prior.sampler.sample(None, 3, generator=seeded(5)) / 2 + 0.5).clamp(0, 1)
    assert (ours - plain_samples(tmp_path / "saved", 3, 8, 5)).abs().max() < 1e-5


def test_ddim_is_saved_as_ddpm(tmp_path: Path) -> None:
    """A pipeline with a DDIM scheduler, called plainly, would sample at eta 0: another law."""
    scheduler = DDIMScheduler(
        clip_sample=False, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    save_pipeline(tmp_path / "saved", new_unet(), scheduler, card="")
    loaded = load_pipeline(tmp_path / "saved").scheduler
    assert type(loaded) is DDPMScheduler and loaded.config["variance_type"] == "fixed_small"
    ours, theirs = scheduler_grid(loaded, 8), scheduler_grid(scheduler, 8)
    assert torch.equal(ours.schedule.signal, theirs.schedule.signal)
    assert torch.equal(ours.std, theirs.std)


def test_saving_replaces_a_pipeline_and_nothing_else(tmp_path: Path) -> None:
    scheduler = DDPMScheduler(clip_sample=False)
    for card in ("one", "two"):
        save_pipeline(tmp_path / "saved", new_unet(), scheduler, card=card)
    assert (tmp_path / "saved" / "README.md").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("years of work")
    with pytest.raises(InputError, match="exists and is no pipeline"):
        save_pipeline(tmp_path / "thesis", new_unet(), scheduler, card="")
    assert (tmp_path / "thesis" / "text").read_text() == "years of work"


def test_sources_without_a_pipeline(tmp_path: Path) -> None:
    for source in (tmp_path / "nothing", tmp_path, "google/ddpm-cifar10-32"):
        with pytest.raises(InputError, match="no diffusers pipeline can be read from"):
            load_pipeline(source)
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="holds a StableDiffusionPipeline"):
        load_pipeline(tmp_path)


def test_a_pipeline_of_the_cifar10_class() -> None:
    """The blocks and the scheduler of google/ddpm-cifar10-32, attention at 16 x 16, narrower."""
    down = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    unet = new_unet(
        sample_size=32,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=(8, 16, 16, 16),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    clipped = DDPMScheduler(variance_type="fixed_large", clip_sample=True)
    with pytest.raises(InputError, match="clip_sample=False"):
        open_pipeline(DDPMPipeline(unet, clipped), levels=4)
    unclipped: Any = DDPMScheduler.from_config(clipped.config, clip_sample=False)
    prior = open_pipeline(DDPMPipeline(unet, unclipped), levels=4)
    beta = 1 - unclipped.alphas_cumprod[250].double() / unclipped.alphas_cumprod[0].double()
    assert float(prior.diffusion.std[2].flatten()[0]) == pytest.approx(float(beta) ** 0.5)
    assert prior.sampler.sample(None, 2, generator=seeded(0)).shape == (2, 3, 32, 32)


def test_unet_without_a_size_is_refused() -> None:
    pipeline = DDPMPipeline(new_unet(sample_size=None), DDPMScheduler(clip_sample=False))
    with pytest.raises(InputError, match="sample_size"):
        open_pipeline(pipeline, levels=4)


def test_classes_start_as_the_unconditional_network() -> None:
    unet, x, labels = new_unet(), torch.randn((3, 3, 8, 8), generator=seeded(1)), torch.arange(3)
    conditional = with_classes(unet, 3)
    assert type(conditional) is UNet2DModel and conditional.config["num_class_embeds"] == 3
    assert unet.config["num_class_embeds"] is None
    before = unet(x, 7).sample
    assert torch.equal(conditional(x, 7, class_labels=labels).sample, before)
    with torch.no_grad():
        conditional.class_embedding.weight[1] = 1.0
    after = conditional(x, 7, class_labels=labels).sample
    assert torch.equal(after[::2], before[::2]) and not torch.allclose(after[1], before[1])
    with pytest.raises(InputError, match="already takes classes"):
        with_classes(conditional, 3)


def test_channels_start_as_the_unconditional_network() -> None:
    unet, x = new_unet(), torch.randn((3, 3, 8, 8), generator=seeded(1))
    seen = torch.randn((3, 2, 8, 8), generator=seeded(2))
    conditional = with_channels(unet, 2)
    assert type(conditional) is UNet2DModel and conditional.config["in_channels"] == 5
    assert unet.config["in_channels"] == 3
    before = unet(x, 7).sample
    joined = torch.cat([x, seen], 1)
    torch.testing.assert_close(conditional(joined, 7).sample, before, rtol=0, atol=1e-6)
    conditional(joined, 7).sample.square().sum().backward()
    assert conditional.conv_in.weight.grad is not None
    assert conditional.conv_in.weight.grad[:, 3:].abs().min() > 0


@pytest.mark.parametrize("widen", [with_classes, with_channels])
def test_conditional_networks_load_in_plain_diffusers(widen: Any, tmp_path: Path) -> None:
    unet = widen(new_unet(), 2)
    save_pipeline(tmp_path / "saved", unet, DDPMScheduler(clip_sample=False), card="")
    loaded = UNet2DModel.from_pretrained(tmp_path / "saved", subfolder="unet")
    assert loaded.state_dict().keys() == unet.state_dict().keys()
    for name, value in unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_the_condition_reaches_the_network_as_encoded() -> None:
    """Class labels and channels, each row its own; without `encode` the condition is ignored."""
    unet = with_channels(with_classes(new_unet(), 2), 1)
    assert unet.class_embedding is not None
    for parameter in (unet.class_embedding.weight, unet.conv_in.weight):
        nn.init.normal_(parameter, std=0.3, generator=seeded(3))
    grid = scheduler_grid(DDPMScheduler(clip_sample=False), 4)
    x, level = torch.randn((2, 3, 8, 8), generator=seeded(1)), torch.tensor([1, 3])
    condition = {"label": torch.tensor([0, 1]), "seen": torch.ones(2, 1, 8, 8)}
    denoiser = UNetDenoiser(
        unet, grid.timesteps, encode=lambda c: UNetInputs(c["label"], c["seen"])
    )
    together = denoiser(x, level, condition)
    for row, timestep in enumerate([0, 500]):
        joined = torch.cat([x[row], condition["seen"][row]])[None]
        alone = unet(joined, timestep, class_labels=condition["label"][row : row + 1]).sample
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    plain = UNetDenoiser(new_unet(), grid.timesteps)
    assert torch.equal(plain(x, level, condition), plain(x, level, None))


def test_half_precision_inside_only() -> None:
    """Predictions come out in float32, near those of float32; equal networks stay equal."""
    pipeline = DDPMPipeline(new_unet(), DDPMScheduler(clip_sample=False, prediction_type="sample"))
    half = open_pipeline(pipeline, levels=4, precision=torch.bfloat16)
    full = open_pipeline(pipeline, levels=4)
    path = rollout(half.diffusion, half.denoiser, None, 2, generator=seeded(0))
    level = torch.tensor([1, 4])
    prediction = half.denoiser(path.x[2], level, None)
    reference = full.denoiser(path.x[2], level, None)
    assert prediction.dtype == torch.float32 and path.x.dtype == torch.float32
    assert 0 < (prediction - reference).abs().max() < 0.1 * reference.abs().max()
    assert (log_ratio(half.diffusion, half.denoiser, half.denoiser, path) == 0).all()


def test_the_chain_is_where_the_network_is():
    """A device that is not the CPU, as a GPU is."""
    unet = new_unet().to("meta")
    prior = open_pipeline(DDPMPipeline(unet, DDPMScheduler(clip_sample=False)), levels=5)
    assert prior.diffusion.signal.device.type == "meta"
    assert {one.device.type for one in prior.denoiser.buffers()} == {"meta"}
