"""Three updates on a fixed batch, of which each process takes its share; run as a program.

python two_processes.py TASK OUT       (with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set)
"""

import copy
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from rtb_rl.core import (
    GaussianDiffusion,
    ScalarLogZ,
    Trajectory,
    VelocityPrediction,
    conditions,
    log_snr_schedule,
    zero_terminal_signal,
)
from rtb_rl.core.gaussian import large_spread
from rtb_rl.nn import ResidualMLP
from rtb_rl.training import Finetuner, FinetuneSettings, Mix, Task
from rtb_rl.training.ema import TrainedState
from rtb_rl.training.paths import Part, PathSource

ROWS, LEVELS = 8, 4


class Share:
    """The rows of a batch that belong to this process."""

    floored = 0

    def __init__(self, whole: PathSource, accelerator: Accelerator):
        self.whole, size = whole, ROWS // accelerator.num_processes
        first = accelerator.process_index * size
        self.rows = slice(first, first + size)
        self.replay = whole.replay

    def draw(self):
        (whole,) = self.whole.draw()
        condition = conditions.take(whole.path.condition, self.rows)
        path = Trajectory(whole.path.x[:, self.rows], condition)
        numbers = (whole.log_ratio, whole.log_reward, whole.on_policy)
        own = (values[self.rows] for values in numbers)
        return [Part(path, *own, whole.so_far[:, self.rows])]


def trained(
    trainer: Finetuner, whole: FinetuneSettings, accelerator: Accelerator
) -> dict[str, Tensor]:
    """What the trainer makes of its share of the batches that `whole` asks for."""
    source = PathSource(trainer.task, whole, generator=trainer.generator)
    trainer.paths = Share(source, accelerator)
    for step in range(3):
        trainer.update(step)
    log_z = {f"log_z.{name}": value for name, value in trainer.log_z.state_dict().items()}
    state = TrainedState(trainer.task.posterior).state_dict() | log_z
    return {name: value.detach().clone() for name, value in state.items()}


def toy(accelerator: Accelerator) -> dict[str, Tensor]:
    """A plane without conditions."""
    generator = torch.Generator().manual_seed(0)
    schedule = zero_terminal_signal(log_snr_schedule(LEVELS))
    diffusion = GaussianDiffusion(schedule, (2,), large_spread(schedule))
    prior = VelocityPrediction(ResidualMLP(2, LEVELS, width=16, generator=generator), schedule)
    task = Task("toy", diffusion, prior, copy.deepcopy(prior), lambda x0, c: x0.sum(1))
    whole = FinetuneSettings(
        updates=3, beta_warmup=1, conditions=ROWS, mix=Mix(1, data=0), levels_per_path=None
    )
    settings = replace(whole, conditions=ROWS // accelerator.num_processes)
    trainer = Finetuner(task, ScalarLogZ(), settings, generator=generator, accelerator=accelerator)
    return trained(trainer, whole, accelerator)


def text_to_image(accelerator: Accelerator) -> dict[str, Tensor]:
    """Adapters on a small pipeline, two prompts, with either log Z.

    By plain gradient descent, which shows the size of a gradient, as AdamW does not.
    """
    from tiny_stable_diffusion import tiny_sd

    from rtb_rl.adapters.text_to_image import open_text_to_image
    from rtb_rl.tasks.text_to_image import prompt_list, text_to_image_task
    from rtb_rl.tasks.text_to_image.target import PromptTarget, group_log_z, learned_log_z
    from rtb_rl.tasks.text_to_image.trainers import TextToImagePosteriorSettings

    def brightness(images, prompts, metadata):
        return images.mean((1, 2, 3)) * torch.tensor([float(len(text)) for text in prompts])

    whole = FinetuneSettings(
        updates=3,
        beta_warmup=1,
        conditions=4,
        mix=Mix(ROWS // 4, data=0),
        levels_per_path=None,
        beta=100.0,  # rounding of a log-ratio is about 1e-3 nats
        learning_rate=1e-5,
        log_z_learning_rate=1e-5,
        gradient_clip=math.inf,
    )
    share = replace(whole, conditions=whole.conditions // accelerator.num_processes)
    settings = TextToImagePosteriorSettings(share, lora_rank=2)
    found, prompts = {}, prompt_list(["a red cat", "two dogs"])
    for make_log_z in (learned_log_z, group_log_z):
        prior = open_text_to_image(tiny_sd(), prompts.texts, levels=LEVELS, guidance=3.0)
        target = PromptTarget("bright", brightness, prompts, make_log_z)
        task, _ = text_to_image_task(prior, target, settings, seed=0)
        generator = torch.Generator().manual_seed(0)
        log_z = make_log_z(prior.prompts, share.mix.total, generator)
        given = {"generator": generator, "accelerator": accelerator, "optimiser": torch.optim.SGD}
        state = trained(Finetuner(task, log_z, share, **given), whole, accelerator)
        found |= {f"{make_log_z.__name__}.{name}": value for name, value in state.items()}
    return found


TASKS = {"toy": toy, "text-to-image": text_to_image}

if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    state = TASKS[sys.argv[1]](accelerator)
    save_file(state, Path(sys.argv[2]) / f"{accelerator.process_index}.safetensors")
    accelerator.end_training()
