"""The prior is what the pipeline samples, the posterior starts there, and images are its own."""

import copy
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_stable_diffusion import LEVELS_OF_NOISE, tiny_scheduler, tiny_sd, tiny_sd2, tiny_sdxl
from torch import Tensor, nn

from rtb_rl.adapters.lora import add_lora, lora_layers, shared_view
from rtb_rl.adapters.prompts import Guided
from rtb_rl.adapters.text_to_image import (
    TextToImagePrior,
    open_text_to_image,
    posterior_denoiser,
)
from rtb_rl.core import rollout
from rtb_rl.core.trajectory import rollout_against
from rtb_rl.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:the schedule leaves signal")

TEXTS, LEVELS, GUIDANCE = ["a red cat", "two dogs"], 5, 4.0
BOTH = torch.tensor([0, 1])
MAKE = {"sd": tiny_sd, "sd2": tiny_sd2, "sdxl": tiny_sdxl}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def priors() -> dict[str, TextToImagePrior]:
    settings = {"levels": LEVELS, "guidance": GUIDANCE}
    return {name: open_text_to_image(make(), TEXTS, **settings) for name, make in MAKE.items()}


def plain_latents(pipeline: Any, **settings: Any) -> Tensor:
    """What diffusers draws by itself."""
    given = {"prompt": TEXTS, "num_inference_steps": LEVELS, "guidance_scale": GUIDANCE, "eta": 1.0}
    given |= {"generator": seeded(3), "output_type": "latent", **settings}
    return pipeline(**given).images


def our_latents(prior: TextToImagePrior, last_noise: bool = True) -> Tensor:
    """x[0] of a rollout, or the mean of its last step."""
    path = rollout(prior.diffusion, prior.denoiser, BOTH, 2, generator=seeded(3))
    if last_noise:
        return path.x0
    one = torch.ones(2, dtype=torch.int64)
    with torch.no_grad():
        return prior.diffusion.kernel(prior.denoiser(path.x[1], one, BOTH), path.x[1], one).mean


@pytest.mark.parametrize("name", MAKE)
def test_rollouts_are_the_pipelines_own(name: str, priors: dict[str, TextToImagePrior]) -> None:
    """For the same generator, step for step; sd2's scheduler adds no noise in its last step."""
    ours = our_latents(priors[name], last_noise=name != "sd2")
    theirs = plain_latents(priors[name].pipeline)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    unguided = plain_latents(priors[name].pipeline, guidance_scale=1.0)
    assert (theirs - unguided).abs().max() > 0.1


def exact(pipeline: Any) -> Any:
    """The pipeline in float64, with its scheduler's table."""
    scheduler = pipeline.to(torch.float64).scheduler
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return pipeline


@pytest.mark.parametrize(
    "settings",
    [
        {"negative": "a dog"},
        {"guidance": 1.0},
        {"size": (8, 24)},
        {"levels": 7, "scheduler": {"prediction_type": "sample"}},
        {"levels": 7, "scheduler": {"prediction_type": "v_prediction"}},
        {"scheduler": {"timestep_spacing": "trailing"}},
    ],
    ids=["negative prompt", "no guidance", "size", "predicts x0", "predicts v", "trailing"],
)
@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_rollouts_with_other_settings(make: Any, settings: dict[str, Any]) -> None:
    """In float64, where nothing but rounding is left between ours and the pipeline's own."""
    settings = {"guidance": GUIDANCE, "levels": LEVELS, **settings}
    scheduler = tiny_scheduler(**settings.pop("scheduler", {}))
    prior = open_text_to_image(exact(make(scheduler=scheduler)), TEXTS, **settings)
    prior.diffusion.dtype = torch.float64
    negative, size = settings.get("negative"), settings.get("size", (16, 16))
    told: dict[str, Any] = {"height": size[0], "width": size[1]}
    told |= {"guidance_scale": settings["guidance"], "num_inference_steps": settings["levels"]}
    theirs = plain_latents(prior.pipeline, negative_prompt=negative and 2 * [negative], **told)
    assert theirs.dtype == torch.float64 and theirs.std() > 0.1
    torch.testing.assert_close(our_latents(prior), theirs, rtol=1e-9, atol=1e-9)


def test_rollouts_of_a_ddpm_scheduler() -> None:
    """Its own spread, and no noise that counts in the last step: 1e-10."""
    scheduler = DDPMScheduler(clip_sample=False, steps_offset=1, **LEVELS_OF_NOISE)
    prior = open_text_to_image(
        tiny_sdxl(scheduler=scheduler), TEXTS, levels=LEVELS, guidance=GUIDANCE
    )
    theirs = plain_latents(prior.pipeline)
    torch.testing.assert_close(our_latents(prior, last_noise=False), theirs, rtol=1e-5, atol=1e-4)


def adapted(prior: TextToImagePrior) -> tuple[nn.Module, nn.Module]:
    """A view of the prior's U-Net with fresh adapters, and the posterior over it."""
    unet = add_lora(shared_view(prior.pipeline.unet), rank=2, generator=seeded(0))
    return unet, posterior_denoiser(prior, unet)


def change(unet: nn.Module) -> None:
    for layer in lora_layers(unet):
        weight = layer.lora_B["default"].get_parameter("weight")
        nn.init.normal_(weight, std=0.2, generator=seeded(9))


@pytest.mark.parametrize("name", MAKE)
def test_the_posterior_starts_at_the_prior(name: str, priors: dict[str, TextToImagePrior]) -> None:
    """Every log-ratio is zero; with changed adapters it is not, and the prior is what it was."""
    prior = priors[name]
    unet, posterior = adapted(prior)

    def ratio() -> Tensor:
        pair = posterior, prior.denoiser
        return rollout_against(prior.diffusion, *pair, BOTH, 2, generator=seeded(4))[1]

    before = rollout(prior.diffusion, prior.denoiser, BOTH, 2, generator=seeded(3)).x
    assert torch.equal(ratio(), torch.zeros(2))
    change(unet)
    assert (ratio().abs() > 1).all()
    after = rollout(prior.diffusion, prior.denoiser, BOTH, 2, generator=seeded(3)).x
    assert torch.equal(before, after)


def test_one_unet_in_memory(priors: dict[str, TextToImagePrior]) -> None:
    """Apart from the adapters, which alone are trained and alone are in the posterior's state."""
    prior = priors["sdxl"]
    unet, posterior = adapted(prior)
    held = {value.data_ptr() for value in prior.pipeline.unet.parameters()}
    frozen = {p.data_ptr() for p in posterior.parameters() if not p.requires_grad}
    assert frozen == held
    trained = {name for name, p in posterior.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert {name.rpartition("unet.")[2] for name in posterior.state_dict()} == set(
        unet.state_dict()
    )
    assert not any(p.requires_grad for part in parts(prior) for p in part.parameters())


def parts(prior: TextToImagePrior) -> list[nn.Module]:
    return [part for part in prior.pipeline.components.values() if isinstance(part, nn.Module)]


def test_gradients_reach_the_adapters_through_guidance(priors: dict[str, TextToImagePrior]) -> None:
    unet, posterior = adapted(priors["sd"])
    change(unet)
    x = torch.randn((2, 4, 8, 8), generator=seeded(5))
    posterior(x, torch.tensor([2, 4]), BOTH).square().sum().backward()
    gradients = [p.grad for p in posterior.parameters() if p.requires_grad]
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients)


def test_half_precision_inside_only() -> None:
    """By autocast or by the weights: float32 outside, near float32, and exact at the start."""
    full = open_text_to_image(tiny_sd(), TEXTS, levels=LEVELS)
    x, level = torch.randn((2, 4, 8, 8), generator=seeded(5)), torch.tensor([2, 4])
    reference = full.denoiser(x, level, BOTH)
    for pipeline, precision in ((tiny_sd(), torch.bfloat16), (tiny_sd().to(torch.float16), None)):
        prior = open_text_to_image(pipeline, TEXTS, levels=LEVELS, precision=precision)
        prediction = prior.denoiser(x, level, BOTH)
        assert prediction.dtype == torch.float32
        assert 0 < (prediction - reference).abs().max() < 0.1 * reference.abs().max()
        _, posterior = adapted(prior)
        assert torch.equal(posterior(x, level, BOTH), prediction)
        assert {p.dtype for p in posterior.parameters() if p.requires_grad} == {torch.float32}
        images = prior.decode(x)
        assert images.dtype == torch.float32
        torch.testing.assert_close(images, full.decode(x), rtol=0, atol=0.05)


@pytest.mark.parametrize("name", MAKE)
def test_decodes_as_the_pipeline_does(name: str, priors: dict[str, TextToImagePrior]) -> None:
    """One batch is the pipeline's own bit for bit; batches are those of one, to rounding."""
    prior = priors[name]
    pipeline: Any = prior.pipeline
    latents = plain_latents(pipeline)
    images = prior.decode(latents)
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    assert torch.equal(images, pipeline.image_processor.postprocess(decoded, output_type="pt"))
    assert torch.equal(images, plain_latents(pipeline, output_type="pt"))
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.05
    single = open_text_to_image(pipeline, TEXTS, levels=LEVELS, decode_batch=1)
    torch.testing.assert_close(single.decode(latents), images, rtol=0, atol=1e-5)


def test_decodes_a_vae_with_a_shifted_latent(priors: dict[str, TextToImagePrior]) -> None:
    """By the mean and spread that SDXL's config may name, or by a shift."""
    pipeline: Any = tiny_sdxl()
    moments = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [2.0, 1.0, 0.5, 3.0]}
    pipeline.vae.register_to_config(**moments)
    prior = open_text_to_image(pipeline, TEXTS, levels=LEVELS)
    latents = plain_latents(pipeline)
    theirs = plain_latents(pipeline, output_type="pt")
    torch.testing.assert_close(prior.decode(latents), theirs, rtol=0, atol=1e-5)
    assert (theirs - priors["sdxl"].decode(latents)).abs().max() > 0.05
    shifted: Any = tiny_sd()
    shifted.vae.register_to_config(shift_factor=0.25)
    moved = open_text_to_image(shifted, TEXTS, levels=LEVELS).decode(latents)
    scale = shifted.vae.config.scaling_factor
    expected = priors["sd"].decode(latents + 0.25 * scale)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


def test_a_reward_can_be_differentiated_through_images(priors: dict[str, TextToImagePrior]) -> None:
    """The gradient is that of finite differences; without one to take there is no graph."""
    prior = priors["sd"]
    x0 = 0.1 * torch.randn((2, 4, 8, 8), generator=seeded(6))
    direction = torch.randn(x0.shape, generator=seeded(7))
    assert not prior.decode(x0).requires_grad
    leaf = x0.clone().requires_grad_()
    with torch.no_grad():
        assert not prior.decode(leaf).requires_grad
        ends = [prior.decode(x0 + step * direction).double().mean() for step in (-1e-3, 1e-3)]
    prior.decode(leaf).mean().backward()
    assert leaf.grad is not None
    slope = float((leaf.grad * direction).sum())
    assert slope == pytest.approx(float(ends[1] - ends[0]) / 2e-3, rel=0.02)
    assert all(p.grad is None for p in prior.pipeline.vae.parameters())


def test_a_copied_posterior_is_independent(priors: dict[str, TextToImagePrior]) -> None:
    """As an average of it is: prompts and levels come along."""
    unet, posterior = adapted(priors["sd"])
    average = copy.deepcopy(posterior)
    x, level = torch.randn((2, 4, 8, 8), generator=seeded(5)), torch.tensor([2, 4])
    before = posterior(x, level, BOTH)
    change(unet)
    assert torch.equal(average(x, level, BOTH), before)
    assert not torch.equal(posterior(x, level, BOTH), before)


def test_prompt_numbers_are_needed(priors: dict[str, TextToImagePrior]) -> None:
    x, level = torch.zeros(2, 4, 8, 8), torch.ones(2, dtype=torch.int64)
    for denoiser in (priors["sd"].denoiser, Guided(priors["sd"].denoiser, 1.0)):
        with pytest.raises(InputError, match=r"numbers of its prompts, int64 \[batch\]"):
            denoiser(x, level, None)
