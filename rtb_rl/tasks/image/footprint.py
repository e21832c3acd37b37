"""Work whose memory is measured: updates of an image posterior at any number of levels."""

import torch
from accelerate import Accelerator

from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.pipelines import open_pipeline
from rtb_rl.tasks.image.posterior import posterior_task
from rtb_rl.tasks.image.prior import PriorSettings, new_scheduler, new_unet
from rtb_rl.tasks.image.target import reward_target
from rtb_rl.tasks.image.trainers import PosteriorSettings, relative_trajectory_balance
from rtb_rl.training.mix import Mix
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.settings import FinetuneSettings

with extra("image"):
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline


def two_updates(levels: int) -> None:
    """Of an untrained U-Net of digits on one thread; every level of the paths has a gradient.

    For a process of its own: its threads stay one.
    """
    torch.set_num_threads(1)
    unet = new_unet((1, 8, 8), PriorSettings(), generator=generator_for(0, "prior"))
    prior = open_pipeline(DDPMPipeline(unet, new_scheduler(levels)), levels=levels)
    target = reward_target("brightness", lambda images, _: images.flatten(1).mean(1))
    tuned = FinetuneSettings(
        conditions=32, mix=Mix(on_policy=1, data=0), levels_per_path=None, chunk=256
    )
    given = PosteriorSettings(start=None, finetune=tuned)
    task, _ = posterior_task(prior, target, given, seed=0)
    generator = generator_for(0, "memory")
    trainer = relative_trajectory_balance(task, target, given, generator, Accelerator())
    for step in range(2):
        trainer.update(step)
