"""A continued run's curve has each update once, and counts the seconds on."""

import json

import torch

from rtb_rl.exactness.curve import Curve
from rtb_rl.tasks.toy import learned_spread, mixture_tilt, random_mixture
from rtb_rl.training import Run


def test_lines_of_updates_that_are_made_again_are_dropped(tmp_path):
    generator = torch.Generator().manual_seed(0)
    mixture = random_mixture(1, 2, generator=generator)
    maker = learned_spread(width=8, generator=generator)
    slope = torch.ones(1, dtype=torch.float64)
    toy = mixture_tilt(mixture, slope, levels=3, posterior=maker, generator=generator)
    run = Run(tmp_path, {})

    def follow(steps: range) -> list[dict[str, float]]:
        curve = Curve(run, toy, every=0.0, draws=10)
        for step in steps:
            curve(step, toy.task.posterior)
        return [json.loads(line) for line in curve.path.read_text().splitlines()]

    first = follow(range(1, 6))
    lines = follow(range(4, 8))  # the checkpoint was made after update 3
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert lines[:3] == first[:3]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
