"""Errors while a posterior is trained, against the seconds that training took."""

import json
import time

import torch
from safetensors.torch import save_file
from torch import nn

from rtb_rl.core import Sampler
from rtb_rl.tasks.toy import Toy
from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for


class Curve:
    """Appends {update, seconds, tv, ...} to curve.jsonl of a run every `every` seconds of training.

    Evaluating is not counted. A run that is continued drops the lines of updates it makes again.
    """

    def __init__(self, run: Run, toy: Toy, *, every: float = 10.0, draws: int = 5000):
        self.path, self.toy = run.directory / "curve.jsonl", toy
        self.every, self.draws = every, draws
        self.lines: list[dict[str, float]] | None = None
        self.seconds, self.begun = 0.0, time.monotonic()

    def __call__(self, step: int, posterior: nn.Module) -> None:
        if self.lines is None:
            self.lines = [line for line in self._written() if line["update"] < step]
            self.seconds = self.lines[-1]["seconds"] if self.lines else 0.0
        self.seconds += time.monotonic() - self.begun
        last = self.lines[-1]["seconds"] if self.lines else 0.0
        if self.seconds >= last + self.every:
            generator = generator_for(0, "curve")
            with torch.no_grad():
                sampler = Sampler(self.toy.task.diffusion, posterior)
                x0 = sampler.sample(None, self.draws, generator=generator)
            errors = self.toy.errors(x0, None)
            self.lines.append({"update": step, "seconds": self.seconds, **errors})
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            replace_file(self.path, text.encode())
        self.begun = time.monotonic()

    def _written(self) -> list[dict[str, float]]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def save_draws(run: Run, toy: Toy, posterior: nn.Module, *, seed: int, draws: int = 4000) -> None:
    """Draws of posterior, prior and target as draws.safetensors of a run, for figures."""
    diffusion, prior = toy.task.diffusion, toy.task.prior
    assert toy.task.draw_target is not None
    generator = generator_for(seed, "draws")
    points = {
        "posterior": Sampler(diffusion, posterior).sample(None, draws, generator=generator),
        "prior": Sampler(diffusion, prior).sample(None, draws, generator=generator),
        "target": toy.task.draw_target(None, draws, generator=generator),
    }
    save_file(
        {name: x.contiguous() for name, x in points.items()}, run.directory / "draws.safetensors"
    )
