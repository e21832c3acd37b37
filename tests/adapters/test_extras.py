"""What the packages behind adapters say is left out where it is no news, and only there."""

import logging
import os
import subprocess
import sys
from contextlib import contextmanager
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest
from diffusers.utils import logging as of_diffusers
from huggingface_hub import utils as hub
from transformers.utils import logging as of_transformers

from rtb_rl.adapters.extras import BACKENDS, extra, without_progress
from rtb_rl.errors import InputError

FOLDERS = os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parent)))


def said(script, *arguments):
    """Output and errors of a script in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": FOLDERS, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


SAVES_AND_LOADS = """
import sys
from pathlib import Path
import torch
from rtb_rl.adapters.lora import add_lora, shared_view
from rtb_rl.adapters.text_to_image import load_text_to_image
from rtb_rl.adapters.text_to_image_export import save_lora_weights, save_pipeline_with
from tiny_stable_diffusion import tiny_sd
folder, pipeline = Path(sys.argv[1]), tiny_sd()
save_pipeline_with(folder / "sd", pipeline, pipeline.unet, card="")
pipeline = load_text_to_image(folder / "sd")
unet = add_lora(shared_view(pipeline.unet), rank=2, generator=torch.Generator())
save_lora_weights(folder / "lora", pipeline, unet, card="")
print(*sorted(path.name for path in folder.iterdir()))
"""


def test_a_pipeline_is_imported_saved_and_loaded_in_silence(tmp_path):
    """No word on torchvision, no bar for parts, shards and weights."""
    assert said(SAVES_AND_LOADS, tmp_path) == ("lora sd\n", "")


LOADS = """
import sys
from pathlib import Path
from hub_models import save_bert, save_gpt2
from tiny_clip import save_clip
from rtb_rl.adapters.causal_lm import load_causal_lm
from rtb_rl.adapters.clip import clip_from_weights, load_clip
from rtb_rl.adapters.masked_lm import load_masked_lm
clip, bert, gpt2 = (Path(sys.argv[1]) / name for name in ("clip", "bert", "gpt2"))
save_clip(clip), save_bert(bert, ["a cat"]), save_gpt2(gpt2, ["a cat"])
print("saved", file=sys.stderr)
weights = load_clip(clip).model.state_dict()
clip_from_weights(weights, "weights", processor=clip)
load_masked_lm(bert), load_causal_lm(str(gpt2))
"""


def test_models_of_transformers_are_loaded_in_silence(tmp_path):
    _, errors = said(LOADS, tmp_path)
    assert errors.partition("saved\n")[2] == ""


def test_nothing_is_imported_to_be_silenced():
    script = (
        "import sys, rtb_rl.adapters\n"
        "from rtb_rl.adapters.extras import extra, without_progress\n"
        "with extra('image'), without_progress(): pass\n"
        "print({'transformers', 'diffusers', 'huggingface_hub'} & set(sys.modules))"
    )
    assert said(script) == ("set()\n", "")


def bars():
    """Whether those of diffusers, of transformers and of downloads are shown."""
    shown = [one.is_progress_bar_enabled() for one in (of_diffusers, of_transformers)]
    return (*shown, not hub.are_progress_bars_disabled())


def show(*shown):
    """Switch them; transformers switches those of downloads as well, so that they come last."""
    for one, on in zip((of_diffusers, of_transformers), shown, strict=False):
        (one.enable_progress_bar if on else one.disable_progress_bar)()
    (hub.enable_progress_bars if shown[2] else hub.disable_progress_bars)()


@contextmanager
def kept():
    before = bars()
    try:
        yield
    finally:
        show(*before)


@pytest.mark.parametrize("before", [(True, True, True), (False, True, False), (True, False, True)])
@pytest.mark.parametrize("fails", [False, True])
def test_bars_are_put_back_as_they_were_and_downloads_keep_theirs(before, fails):
    with kept():
        show(*before)
        try:
            with without_progress():
                assert bars() == (False, False, before[2])
                with without_progress():
                    assert bars() == (False, False, before[2])
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        assert bars() == before


def test_torchvision_is_not_missed_while_an_extra_is_imported(monkeypatch):
    """Anything else is said, then and later; so is this, later."""
    logger, heard = logging.getLogger(BACKENDS), BufferingHandler(9)
    monkeypatch.setattr(logger, "handlers", [heard])
    missed = "`%s` requires torchvision (not installed); falling back to the other"
    with extra("text-to-image"):
        logger.warning(missed, "ImageProcessor")
        with extra("image"):
            pass
        logger.warning(missed, "OtherProcessor")
        logger.warning("something else")
    logger.warning(missed, "LaterProcessor")
    texts = [record.getMessage() for record in heard.buffer]
    assert texts == ["something else", missed % "LaterProcessor"] and not logger.filters


def test_a_missing_package_is_one_error_with_the_extra():
    words = r"not installed \(No module.*pip install 'rtb-rl\[image\]'"
    with pytest.raises(InputError, match=words), extra("image"):
        import no_such_package  # type: ignore # noqa: F401
    assert not logging.getLogger(BACKENDS).filters
