"""From mathematics to a job: pretraining, fine-tuning, runs, checkpoints."""

from rtb_rl.training.diagnostics import diagnose
from rtb_rl.training.evidence import write_rows
from rtb_rl.training.finetune import Finetuner, FinetuneSettings, Mix
from rtb_rl.training.loop import train
from rtb_rl.training.pretrain import Pretrainer, PretrainSettings
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import GeneratorState, generator_for
from rtb_rl.training.task import Task

__all__ = [
    "FinetuneSettings",
    "Finetuner",
    "GeneratorState",
    "Mix",
    "PretrainSettings",
    "Pretrainer",
    "Run",
    "Task",
    "diagnose",
    "generator_for",
    "train",
    "write_rows",
]
