"""Every supported diffusers scheduler against its own step, and what is refused."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.schedulers import diffusion_from_scheduler, scheduler_grid
from rtb_rl.adapters.unets import denoiser_from_unet
from rtb_rl.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:the schedule leaves signal")

SHAPE = (3, 2, 2)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
SPACINGS = ("leading", "trailing", "linspace")


class Answer(nn.Module):
    """A network that gives one answer, and remembers the timestep it was asked about."""

    def __init__(self, answer: Tensor):
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None) -> Any:
        self.asked = timestep
        return SimpleNamespace(sample=self.answer)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int) -> Tensor:
    return torch.randn((2, *SHAPE), generator=seeded(seed), dtype=torch.float64)


def exact(scheduler: Any) -> Any:
    """The scheduler with its table in float64, so that its own step rounds as little as ours."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def ddpm_step(scheduler: DDPMScheduler, output: Tensor, timestep: Tensor, x: Tensor, seed: int):
    return scheduler.step(output, int(timestep), x, generator=seeded(seed)).prev_sample


def ddim_step(scheduler: DDIMScheduler, output: Tensor, timestep: Tensor, x: Tensor, seed: int):
    noise = normal(seed)
    return scheduler.step(output, int(timestep), x, eta=1.0, variance_noise=noise).prev_sample


def own_steps(scheduler: Any, step: Callable[..., Tensor], levels: int) -> tuple[Tensor, Tensor]:
    """(means [K, 2, *SHAPE], spreads [K]) of the scheduler's steps from one x and one output.

    The spread is the response to a change of the noise, the mean what is left.
    """
    scheduler.set_timesteps(levels)
    x, output, change = normal(1), normal(2), normal(3) - normal(4)
    means, stds = [], []
    for timestep in scheduler.timesteps.flip(0):
        one, other = (step(scheduler, output, timestep, x, seed) for seed in (3, 4))
        std = ((one - other) * change).sum() / change.square().sum()
        means.append(one - std * normal(3))
        stds.append(std)
    return torch.stack(means), torch.stack(stds)


def our_steps(scheduler: Any, levels: int) -> tuple[Tensor, Tensor]:
    """The same of our kernels, whose network must be asked about the scheduler's timesteps.

    The declared spread of a last step without noise is checked, and given as the scheduler's zero.
    """
    grid = scheduler_grid(scheduler, levels)
    diffusion = diffusion_from_scheduler(scheduler, SHAPE, levels=levels)
    unet = Answer(normal(2))
    denoiser = denoiser_from_unet(unet, scheduler, grid)
    level = torch.arange(1, levels + 1)
    kernels = []
    for k in level:
        both = k.expand(2)
        kernels.append(diffusion.kernel(denoiser(normal(1), both, None), normal(1), both))
        assert unet.asked.tolist() == [int(grid.timesteps[k])] * 2
    stds = torch.stack([kernel.std[0].flatten()[0] for kernel in kernels])
    if grid.std[0] == 0:
        noise = (1 - scheduler.alphas_cumprod[grid.timesteps[1]]).sqrt()
        torch.testing.assert_close(stds[0], noise, rtol=1e-9, atol=0)
        stds[0] = 0.0
    return torch.stack([kernel.mean for kernel in kernels]), stds


def assert_same_steps(scheduler: Any, step: Callable[..., Tensor], levels: int) -> None:
    """1e-7 where rounding is under a square root (DDIM); else far below."""
    for ours, own in zip(our_steps(scheduler, levels), own_steps(scheduler, step, levels)):
        torch.testing.assert_close(ours, own, rtol=1e-9, atol=1e-7 if step is ddim_step else 1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_ddpm_step(variance: str, prediction: str, spacing: str) -> None:
    """Mean and spread at every level are those of DDPMScheduler.step."""
    config = {"variance_type": variance, "prediction_type": prediction, "clip_sample": False}
    for levels in (10, 37):
        scheduler = exact(DDPMScheduler(**config, timestep_spacing=spacing))
        assert_same_steps(scheduler, ddpm_step, levels)


@pytest.mark.parametrize(
    "config",
    [
        {"variance_type": "fixed_small"},
        {"variance_type": "fixed_large", "beta_schedule": "squaredcos_cap_v2"},
        {"variance_type": "fixed_large", "timestep_spacing": "leading", "num_train_timesteps": 50},
    ],
)
def test_ddpm_step_at_every_trained_timestep(config: dict) -> None:
    scheduler = exact(DDPMScheduler(**{"num_train_timesteps": 200, "clip_sample": False} | config))
    assert_same_steps(scheduler, ddpm_step, scheduler.config["num_train_timesteps"])


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_step_at_eta_one(prediction: str, spacing: str) -> None:
    """Mean and spread are those of DDIMScheduler.step(eta=1) where its previous level is right."""
    for levels in (10, 40):
        scheduler = exact(
            DDIMScheduler(prediction_type=prediction, timestep_spacing=spacing, clip_sample=False)
        )
        assert_same_steps(scheduler, ddim_step, levels)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_no_signal_at_the_last_level(variance: str, prediction: str, spacing: str) -> None:
    """Zero terminal signal, arXiv 2305.08891: nothing is left at level K and the step is right."""
    scheduler = exact(
        DDPMScheduler(
            rescale_betas_zero_snr=True,
            timestep_spacing=spacing,
            prediction_type=prediction,
            variance_type=variance,
            clip_sample=False,
        )
    )
    assert scheduler_grid(scheduler, 10).schedule.signal[-1] == 0
    assert_same_steps(scheduler, ddpm_step, 10)


def test_ddim_without_signal_at_the_last_level() -> None:
    scheduler = exact(
        DDIMScheduler(
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            prediction_type="v_prediction",
            clip_sample=False,
        )
    )
    assert_same_steps(scheduler, ddim_step, 10)


@pytest.mark.parametrize(("spacing", "levels"), [("linspace", 10), ("trailing", 7)])
def test_ddim_takes_a_wrong_previous_level_and_we_do_not(spacing: str, levels: int) -> None:
    """diffusers issue 11347: DDIM's step goes to t - T // K, which is not the next timestep for
    linspace or a K that does not divide T. Ours goes there, as the DDPM scheduler does.
    """
    config: dict[str, Any] = {"timestep_spacing": spacing, "clip_sample": False}
    ddim, ddpm = exact(DDIMScheduler(**config)), exact(DDPMScheduler(**config))
    grids = scheduler_grid(ddim, levels), scheduler_grid(ddpm, levels)
    assert torch.equal(grids[0].schedule.signal, grids[1].schedule.signal)
    assert torch.equal(grids[0].std, grids[1].std)
    assert_same_steps(ddpm, ddpm_step, levels)
    own, ours = own_steps(ddim, ddim_step, levels), our_steps(ddim, levels)
    wrong = ddim.timesteps.flip(0).diff() != ddim.config["num_train_timesteps"] // levels
    same = (own[1] - ours[1]).abs()[1:] < 1e-9
    assert bool(wrong.any()) and torch.equal(same, ~wrong)


def test_ddim_that_stops_short_of_clean_data() -> None:
    """set_alpha_to_one=False: the last step ends at the first trained level and has a spread."""
    scheduler = exact(DDIMScheduler(set_alpha_to_one=False, steps_offset=1, clip_sample=False))
    grid = scheduler_grid(scheduler, 10)
    assert float(grid.schedule.signal[0] ** 2) == pytest.approx(float(1 - scheduler.betas[0]))
    assert grid.std[0] > 0
    assert_same_steps(scheduler, ddim_step, 10)


def test_the_scheduler_given_is_left_as_it_was() -> None:
    scheduler = DDPMScheduler(clip_sample=False)
    before = scheduler.timesteps.clone()
    scheduler_grid(scheduler, 10)
    assert torch.equal(scheduler.timesteps, before) and scheduler.num_inference_steps is None


def test_declared_spread_of_the_last_step() -> None:
    scheduler = DDPMScheduler(clip_sample=False)
    declared = diffusion_from_scheduler(scheduler, SHAPE, levels=10, last_std=0.25).std.flatten()
    default = diffusion_from_scheduler(scheduler, SHAPE, levels=10).std.flatten()
    assert declared[1] == 0.25 and torch.equal(declared[2:], default[2:])
    assert float(default[1]) == pytest.approx(0.01, rel=2e-4)  # sqrt(beta_1) = sqrt(1e-4)


@pytest.mark.parametrize(
    ("scheduler", "levels", "cure"),
    [
        (DPMSolverMultistepScheduler(), 10, "DDPMScheduler.from_config"),
        (EulerDiscreteScheduler(), 10, "DDPMScheduler.from_config"),
        (PNDMScheduler(), 10, "DDPMScheduler.from_config"),
        (UniPCMultistepScheduler(), 10, "DDPMScheduler.from_config"),
        (DDPMScheduler(), 10, r"DDPMScheduler.from_config\(scheduler.config, clip_sample=False\)"),
        (DDIMScheduler(), 10, r"DDIMScheduler.from_config\(scheduler.config, clip_sample=False\)"),
        (DDPMScheduler(thresholding=True), 10, "thresholding=False"),
        (DDPMScheduler(clip_sample=False, variance_type="learned"), 10, "fixed_large"),
        (DDPMScheduler(clip_sample=False, variance_type="learned_range"), 10, "fixed_large"),
        (DDPMScheduler(clip_sample=False, variance_type="fixed_large_log"), 10, "fixed_large"),
        (DDPMScheduler(clip_sample=False, prediction_type="flow"), 10, "trained with"),
        (DDPMScheduler(clip_sample=False), 1001, "use 1 to 1000"),
        (DDPMScheduler(clip_sample=False), 0, "use 1 to 1000"),
        (DDPMScheduler(clip_sample=False, steps_offset=1), 1000, "steps_offset=0"),
        (DDIMScheduler(clip_sample=False, set_alpha_to_one=False), 10, "set_alpha_to_one=True"),
    ],
)
def test_refused_with_the_cure(scheduler: Any, levels: int, cure: str) -> None:
    with pytest.raises(InputError, match=cure):
        scheduler_grid(scheduler, levels)


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_the_cure_for_other_schedulers_works(kind: Any) -> None:
    cured = DDPMScheduler.from_config(kind().config, variance_type="fixed_small", clip_sample=False)
    assert scheduler_grid(cured, 10).schedule.levels == 10


def test_noise_prediction_without_signal_is_refused() -> None:
    scheduler = DDPMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    with pytest.raises(InputError, match="v_prediction"):
        denoiser_from_unet(nn.Identity(), scheduler, scheduler_grid(scheduler, 10))


def test_spread_that_is_not_positive_is_refused() -> None:
    with pytest.raises(InputError, match="last_std must be positive, not 0"):
        diffusion_from_scheduler(DDPMScheduler(clip_sample=False), SHAPE, levels=4, last_std=0.0)


def test_missing_packages_name_the_extra() -> None:
    with pytest.raises(InputError, match=r"pip install 'rtb-rl\[image\]'"), extra("image"):
        raise ModuleNotFoundError("No module named 'diffusers'")
