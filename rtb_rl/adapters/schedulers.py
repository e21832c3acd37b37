"""A diffusers scheduler read as data: its levels, and the spread of its steps.

The steps themselves are those of core.GaussianDiffusion; `scheduler.step` is never called. That is
the same law for DDPMScheduler and for DDIMScheduler at eta 1, with the previous level taken from
the next element of `timesteps`, so that every spacing is right (DDIMScheduler's own step takes
t - T // K, which is another level for linspace and for a K that does not divide T).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtb_rl.adapters.extras import extra
from rtb_rl.core import GaussianDiffusion, Schedule
from rtb_rl.core.gaussian import large_spread, small_spread
from rtb_rl.errors import InputError

with extra("image"):
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

Scheduler = DDPMScheduler | DDIMScheduler

SMALL, LARGE = ("fixed_small", "fixed_small_log"), ("fixed_large",)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class SchedulerGrid:
    """The levels of a scheduler set to K steps.

    `timesteps`: int64 [K + 1], what the network is told at each level; entry 0 is unused.
    `std`: float64 [K], the spread of each step, row k - 1 for level k; zero where the scheduler
    adds no noise.
    """

    schedule: Schedule
    timesteps: Tensor
    std: Tensor


def scheduler_grid(scheduler: Scheduler, levels: int) -> SchedulerGrid:
    """The grid of `levels` steps of a DDPM or DDIM scheduler, which is left as it was.

    signal[k] = sqrt(alphas_cumprod[timesteps[k]]); signal[0] is 1, or less for a DDIM scheduler
    with set_alpha_to_one=False. Spread: DDPM fixed_small(_log) and DDIM at eta 1 as
    core.small_spread, DDPM fixed_large as core.large_spread (arXiv 2006.11239 section 3.2,
    2010.02502 eq. 16), both on the grid of K levels.
    Raises InputError for a scheduler that has no such steps, saying what to use instead.
    """
    check_scheduler(scheduler)
    timesteps = _timesteps(scheduler, levels)
    final = getattr(scheduler, "final_alpha_cumprod", torch.ones(()))
    squared = torch.cat([final.reshape(1), scheduler.alphas_cumprod[timesteps[1:]].cpu()])
    if squared[1] >= squared[0]:
        raise InputError(
            f"the last of {levels} steps of this {type(scheduler).__name__} does nothing: it"
            f" starts at timestep {int(timesteps[1])}, which is already where set_alpha_to_one="
            "False ends; set set_alpha_to_one=True or steps_offset=1"
        )
    schedule = Schedule(squared.double().sqrt())
    if _variance_type(scheduler) in LARGE:
        std = large_spread(schedule)
    else:
        std = small_spread(schedule, floor=0.0)
    if timesteps[1] == 0:
        std[0] = 0.0  # diffusers adds no noise at timestep 0, whatever the variance type
    return SchedulerGrid(schedule, timesteps, std)


def diffusion_from_scheduler(
    scheduler: Scheduler,
    event_shape: Sequence[int],
    *,
    levels: int,
    last_std: float | None = None,
) -> GaussianDiffusion:
    """The chain of `levels` steps that the scheduler runs, with densities.

    `last_std` is the spread of the last step, from level 1. Without it that step keeps the
    scheduler's own spread, or where this is zero, and the step has no density, takes sqrt(beta_1)
    of the grid: the noise that level 1 has, so that a change of the predicted noise costs as much
    there as it does elsewhere. Raises InputError as `scheduler_grid`.
    """
    grid = scheduler_grid(scheduler, levels)
    std = grid.std.clone()
    if last_std is not None:
        std[0] = last_std
    elif std[0] == 0:
        std[0] = grid.schedule.step_variance[1].sqrt()
    if not std[0] > 0:
        raise InputError(f"last_std must be positive, not {last_std}")
    return GaussianDiffusion(grid.schedule, event_shape, std)


def ddpm_scheduler(scheduler: Scheduler) -> DDPMScheduler:
    """A DDPMScheduler of the same levels and spreads: what a plain DDPMPipeline samples from.

    A pipeline with a DDIMScheduler would sample at eta 0, which is another law. One difference is
    left: it always decodes to clean data, also where set_alpha_to_one=False stops short of it.
    """
    check_scheduler(scheduler)
    known = DDPMScheduler().config.keys()
    config = {name: value for name, value in scheduler.config.items() if name in known}
    config["variance_type"] = _variance_type(scheduler)
    return DDPMScheduler(**config)


def check_scheduler(scheduler: Scheduler) -> None:
    """Raise InputError unless each step is a Gaussian whose mean is linear in the prediction."""
    name, config = type(scheduler).__name__, scheduler.config
    if type(scheduler) not in (DDPMScheduler, DDIMScheduler):
        raise InputError(
            f"{name} has no Gaussian step of its own that can be scored (it is deterministic,"
            " multistep or on another scale of noise); use DDPMScheduler.from_config("
            'scheduler.config, variance_type="fixed_small", clip_sample=False)'
        )
    if config["thresholding"]:
        raise InputError(
            f"this {name} has thresholding=True, which changes the mean of a step after the"
            f" prediction; use {name}.from_config(scheduler.config, thresholding=False)"
        )
    if config["clip_sample"]:
        raise InputError(
            f"this {name} has clip_sample=True, which changes the mean of a step after the"
            f" prediction; use {name}.from_config(scheduler.config, clip_sample=False)"
        )
    if (variance := _variance_type(scheduler)) not in SMALL + LARGE:
        raise InputError(
            f"variance_type {variance!r} is not one of {', '.join(SMALL + LARGE)}: the spread must"
            " not come from the network; use"
            ' DDPMScheduler.from_config(scheduler.config, variance_type="fixed_large") with a'
            " network that predicts no variance"
        )
    if (prediction := config["prediction_type"]) not in PREDICTION_TYPES:
        raise InputError(
            f"prediction_type {prediction!r} is not one of {', '.join(PREDICTION_TYPES)}; set the"
            " one that the network was trained with"
        )


def _timesteps(scheduler: Scheduler, levels: int) -> Tensor:
    """What the network is told at levels 0..K: int64 [K + 1], increasing from entry 1 on."""
    trained = int(scheduler.config["num_train_timesteps"])
    if not 1 <= levels <= trained:
        raise InputError(
            f"{levels} levels don't fit a scheduler with num_train_timesteps={trained}; use 1 to"
            f" {trained}"
        )
    own = copy.deepcopy(scheduler)
    own.set_timesteps(levels)
    timesteps = torch.cat([torch.zeros(1, dtype=torch.int64), own.timesteps.cpu().flip(0)])
    if timesteps[-1] >= trained:
        raise InputError(
            f"the first of {levels} steps is at timestep {int(timesteps[-1])}, but the scheduler"
            f" has num_train_timesteps={trained}; use fewer levels or steps_offset=0"
        )
    return timesteps


def _variance_type(scheduler: Scheduler) -> str:
    """That of DDPM; DDIM at eta 1 is fixed_small."""
    return scheduler.config.get("variance_type", "fixed_small")
