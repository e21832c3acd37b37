"""Three updates on a fixed batch, of which each process takes its share; run as a program.

python two_processes.py OUT       (with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set)
"""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from rtb_rl.core import (
    GaussianDiffusion,
    ScalarLogZ,
    Trajectory,
    VelocityPrediction,
    log_snr_schedule,
    zero_terminal_signal,
)
from rtb_rl.core.gaussian import large_spread
from rtb_rl.nn import ResidualMLP
from rtb_rl.training import Finetuner, FinetuneSettings, Mix, Task
from rtb_rl.training.paths import PathSource

ROWS, LEVELS = 8, 4


class Share:
    """The rows of a batch that belong to this process."""

    floored = 0

    def __init__(self, whole: PathSource, rank: int, processes: int):
        self.whole, size = whole, ROWS // processes
        self.rows = slice(rank * size, (rank + 1) * size)
        self.replay = whole.replay

    def draw(self):
        ((path, ratio, log_reward),) = self.whole.draw()
        path = Trajectory(path.x[:, self.rows], None)
        return [(path, ratio[self.rows], log_reward[self.rows])]


def parameters_after_training(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    schedule = zero_terminal_signal(log_snr_schedule(LEVELS))
    diffusion = GaussianDiffusion(schedule, (2,), large_spread(schedule))
    prior = VelocityPrediction(ResidualMLP(2, LEVELS, width=16, generator=generator), schedule)
    task = Task("toy", diffusion, prior, copy.deepcopy(prior), lambda x0, c: x0.sum(1))
    whole = FinetuneSettings(
        updates=3, beta_warmup=1, conditions=ROWS, mix=Mix(1, data=0), levels_per_path=None
    )
    settings = replace(whole, conditions=ROWS // accelerator.num_processes)
    log_z = ScalarLogZ()
    trainer = Finetuner(task, log_z, settings, generator=generator, accelerator=accelerator)
    source = PathSource(task, whole, generator=generator)
    trainer.paths = Share(source, accelerator.process_index, accelerator.num_processes)
    for step in range(3):
        trainer.update(step)
    return {**task.posterior.state_dict(), "log_z": log_z.value.detach().clone()}


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    state = parameters_after_training(accelerator)
    save_file(state, Path(sys.argv[1]) / f"{accelerator.process_index}.safetensors")
    accelerator.end_training()
