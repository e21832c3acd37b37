"""From mathematics to a job: pretraining, fine-tuning, runs, checkpoints."""

from rtb_rl.training.calls import NetworkCalls
from rtb_rl.training.diagnostics import diagnose, trust
from rtb_rl.training.evidence import write_comparison, write_rows
from rtb_rl.training.finetune import Finetuner
from rtb_rl.training.loop import train
from rtb_rl.training.mix import Mix
from rtb_rl.training.pretrain import Pretrainer, PretrainSettings
from rtb_rl.training.run import Run
from rtb_rl.training.scoring import score
from rtb_rl.training.seeding import GeneratorState, generator_for
from rtb_rl.training.settings import FinetuneSettings
from rtb_rl.training.task import Task

__all__ = [
    "FinetuneSettings",
    "Finetuner",
    "GeneratorState",
    "Mix",
    "NetworkCalls",
    "PretrainSettings",
    "Pretrainer",
    "Run",
    "Task",
    "diagnose",
    "generator_for",
    "score",
    "train",
    "trust",
    "write_comparison",
    "write_rows",
]
