"""What an update of a text-to-image posterior costs, in seconds and in memory.

    pipeline = random_pipeline(SMALL, generator=generator_for(0, "networks"))
    watch = Stopwatch(new_finetuner(pipeline, Work(levels_per_path=8)))
    watch(0).seconds, watch(1).gradient

Neither depends on what the weights are, so that they are random and nothing is downloaded.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from rtb_rl.adapters.prompts import TextToImagePipeline
from rtb_rl.adapters.text_to_image import open_text_to_image
from rtb_rl.tasks.text_to_image.posterior import text_to_image_task
from rtb_rl.tasks.text_to_image.prompt_lists import prompt_list
from rtb_rl.tasks.text_to_image.random_pipelines import Networks, random_pipeline
from rtb_rl.tasks.text_to_image.rewards import Metadata
from rtb_rl.tasks.text_to_image.target import PromptTarget
from rtb_rl.tasks.text_to_image.trainers import (
    TextToImagePosteriorSettings,
    relative_trajectory_balance,
)
from rtb_rl.training.finetune import Finetuner
from rtb_rl.training.memory import peak_memory
from rtb_rl.training.mix import Mix
from rtb_rl.training.paths import Part
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.settings import FinetuneSettings

PROMPT = "a red circle"
UPDATES = 2  # the first makes the optimiser's moments
MIB = 1024**2


@dataclass(frozen=True)
class Work:
    """An update: `paths` of one prompt, drawn over all levels, and the levels with a gradient."""

    levels: int = 50
    levels_per_path: int | None = 8
    """None: all of them."""
    paths: int = 4
    chunk: int = 4
    """Rows (a path at a level) with a graph at once; guidance makes two of each in the U-Net."""
    draw_batch: int = 8
    guidance: float = 7.5
    lora_rank: int = 4
    pixels: int | None = None
    """Of a side; None: those of the networks."""
    precision: torch.dtype | None = None
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Cost:
    """Seconds of an update, those of them that drew and scored its paths, and its peak of memory.

    `peak`: MiB allocated on a CUDA device, weights included; None elsewhere.
    """

    seconds: float
    drawing: float
    peak: float | None

    @property
    def gradient(self) -> float:
        """Seconds of all but the drawing: loss, gradient, step of the optimiser, average."""
        return self.seconds - self.drawing


class Stopwatch:
    """Does updates of a fine-tuning and says what each cost."""

    def __init__(self, finetuner: Finetuner):
        self.finetuner, self._drawing = finetuner, 0.0
        self._device = finetuner.generator.device
        self._draw = finetuner.paths.draw

    def __call__(self, step: int) -> Cost:
        on_cuda = self._device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        paths = self.finetuner.paths
        paths.draw = self._timed_draw
        try:
            begun = self._now()
            self.finetuner.update(step)
            seconds = self._now() - begun
        finally:
            del paths.draw  # the method of the class is there again
        peak = torch.cuda.max_memory_allocated(self._device) / MIB if on_cuda else None
        return Cost(seconds, self._drawing, peak)

    def _timed_draw(self) -> list[Part]:
        begun = self._now()
        parts = self._draw()
        self._drawing = self._now() - begun
        return parts

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()


def costs_in_turn(watches: Mapping[str, Stopwatch], repeats: int) -> dict[str, Cost]:
    """Medians of `repeats` updates of each, in turn: whatever else the machine does, all share it.

    A first round doesn't count. The peak is the largest.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in watches}
    for step in range(repeats + 1):
        for name, watch in watches.items():
            costs[name].append(watch(step))
    return {name: _median(found[1:]) for name, found in costs.items()}


def peak_of_updates(networks: Networks, work: Work, device: torch.device, updates: int = UPDATES):
    """The largest memory of updates, MiB: allocated on a CUDA device, weights included; elsewhere
    that of a process of its own on one thread, libraries included. Without updates: what is there
    before them.
    """
    if device.type != "cuda":
        return peak_memory(partial(do_updates, networks, work, updates))
    watch = Stopwatch(_random_finetuner(networks, work, device))
    before = torch.cuda.memory_allocated(device) / MIB
    return max([before, *(watch(step).peak or 0.0 for step in range(updates))])


def do_updates(networks: Networks, work: Work, updates: int) -> None:
    """Updates on one thread of the CPU. For a process of its own: its threads stay one."""
    torch.set_num_threads(1)
    finetuner = _random_finetuner(networks, work, torch.device("cpu"))
    for step in range(updates):
        finetuner.update(step)


def new_finetuner(pipeline: TextToImagePipeline, work: Work, *, seed: int = 0) -> Finetuner:
    """Trajectory balance of LoRA weights towards brightness, a reward that costs nothing."""
    prior = open_text_to_image(
        pipeline,
        [PROMPT],
        levels=work.levels,
        guidance=work.guidance,
        size=work.pixels,
        precision=work.precision,
        decode_batch=work.draw_batch,
    )
    target = PromptTarget("brightness", brightness, prompt_list(PROMPT))
    tuned = FinetuneSettings(
        conditions=1,
        mix=Mix(on_policy=work.paths, data=0),
        draw_batch=work.draw_batch,
        levels_per_path=work.levels_per_path,
        chunk=work.chunk,
    )
    settings = TextToImagePosteriorSettings(
        tuned, lora_rank=work.lora_rank, gradient_checkpointing=work.gradient_checkpointing
    )
    task, _ = text_to_image_task(prior, target, settings, seed=seed)
    generator = generator_for(seed, "updates", device=prior.diffusion.signal.device)
    return relative_trajectory_balance(
        task, target, prior.prompts, settings, generator, Accelerator()
    )


def brightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
    """The mean of an image's pixels, nats."""
    return images.mean((1, 2, 3))


def _random_finetuner(networks: Networks, work: Work, device: torch.device) -> Finetuner:
    generator = generator_for(0, "networks", device=device)
    return new_finetuner(random_pipeline(networks, generator=generator), work)


def _median(costs: Sequence[Cost]) -> Cost:
    peaks = [cost.peak for cost in costs if cost.peak is not None]
    return Cost(
        statistics.median(cost.seconds for cost in costs),
        statistics.median(cost.drawing for cost in costs),
        max(peaks, default=None),
    )
