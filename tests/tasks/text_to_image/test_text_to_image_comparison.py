"""An open job without a program: what is kept of a method is what is shown of it."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_stable_diffusion import tiny_sd

from rtb_rl.adapters.text_to_image import TextToImagePrior, open_text_to_image
from rtb_rl.tasks.text_to_image import comparison
from rtb_rl.tasks.text_to_image.comparison import PRIOR, TextToImageJob
from rtb_rl.tasks.text_to_image.evaluation import Measure, Reference, pixel_fields
from rtb_rl.tasks.text_to_image.prompt_lists import prompt_list
from rtb_rl.tasks.text_to_image.reference import prior_draws
from rtb_rl.tasks.text_to_image.settings import TextToImageSettings, budget_for
from rtb_rl.tasks.text_to_image.target import PromptTarget
from rtb_rl.training.run import Run

LEVELS, PROMPTS = 2, ("a cat", "a dog")


def brightness(images, prompts, metadata):
    return 5 * images.mean((1, 2, 3))


@pytest.fixture
def job(tmp_path):
    """Of a tiny pipeline and two prompts."""
    settings = TextToImageSettings(prior="tiny", prompts=PROMPTS, out=tmp_path)
    budget = replace(budget_for("smoke", "tiny"), draws=3, draw_batch=4)
    prior = open_text_to_image(tiny_sd(), PROMPTS, levels=LEVELS, guidance=2.0)
    target = PromptTarget("bright", brightness, prompt_list(PROMPTS))
    draws = prior_draws(tmp_path / "reference", prior, target, 5, batch=4, seed=0)
    measure = Measure(target.log_reward(prior), pixel_fields, None, 4)
    whole = draws.weighted(1.0)
    references = [
        Reference(
            replace(whole, x0=whole.x0[rows], log_weight=whole.log_weight[rows]),
            measure(whole.x0[rows][0], number),
        )
        for number, rows in enumerate((slice(0, 1), slice(1, 2)))
    ]
    run = Run(tmp_path, {"seed": 0})
    return TextToImageJob(settings, budget, run, prior, target, draws, measure, references, [])


def test_the_figure_shows_the_images_that_are_kept(job, monkeypatch):
    """Only the reference is decoded for it."""
    job.add(PRIOR, job.draw_prior)
    job.add("other", job.draw_prior)
    decoded, shown = [], {}
    decode, draw = TextToImagePrior.decode, comparison.draw_figure

    def counted(prior, x0):
        decoded.append(len(x0))
        return decode(prior, x0)

    def caught(path, grids, *others):
        shown.update(grids)
        return draw(path, grids, *others)

    monkeypatch.setattr(TextToImagePrior, "decode", counted)
    monkeypatch.setattr(comparison, "draw_figure", caught)
    job.finish([PRIOR, "other"])
    assert decoded == [36]
    kept = load_file(job.run.directory / "rows" / "prior.safetensors")
    assert kept["images"].dtype == torch.uint8 and kept["images"].shape == (6, 3, 16, 16)
    (name,) = (name for name in shown if name.startswith(PRIOR))
    torch.testing.assert_close(shown[name], decode(job.prior, kept["x0"]), atol=0.501 / 255, rtol=0)
