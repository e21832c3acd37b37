"""CLIP of transformers as unit vectors: how images are prepared, which texts are cut, what is
read and what is refused.
"""

import json
import warnings

import pytest
import torch
from tiny_clip import SIDE, save_clip, tiny_clip
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel

from rtb_rl.adapters.clip import MEAN, STD, Preparation, load_clip, pad_square
from rtb_rl.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def images():
    return torch.rand(4, 3, 30, 41, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(30, 41), (57, 33), (24, 24), (17, 12), (100, 24)])
def test_images_are_prepared_as_transformers_does(size):
    generator = torch.Generator().manual_seed(0)
    # smooth images as well as noise, whose overshoots are cut off
    noise = torch.rand(1, 3, *size, generator=generator)
    smooth = torch.stack(torch.meshgrid(*(torch.linspace(0, 1, n) for n in size), indexing="ij"))
    images = torch.cat([noise, torch.cat([smooth, smooth[:1]])[None]])
    pixels = (images * 255).round().byte()
    processor = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    expected = processor(images=[one for one in pixels], return_tensors="pt")["pixel_values"]
    found = Preparation(SIDE)(pixels / 255)
    levels = (found - expected).abs() * 255 * torch.tensor(STD)[:, None, None]
    assert float(levels.max()) < 1.2 and float(levels.mean()) < 0.4  # PIL rounds to bytes


def test_black_bars_keep_the_proportions():
    wide = torch.full((2, 3, 12, 48), 0.5)
    found = pad_square(wide, SIDE)
    assert found.shape == (2, 3, SIDE, SIDE)
    assert torch.allclose(found[..., 9:15, :], torch.tensor(0.5))
    assert not bool(found[..., :9, :].any()) and not bool(found[..., 15:, :].any())
    assert torch.allclose(pad_square(wide.mT, SIDE), found.mT)
    square = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pad_square(square, SIDE), Preparation(SIDE, (0, 0, 0), (1, 1, 1))(square))


def test_vectors_are_those_of_the_model(folder, images):
    clip, model = load_clip(folder), CLIPModel.from_pretrained(folder).eval()
    pixels = Preparation(SIDE)(images)
    with torch.no_grad():
        pictures = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    assert torch.allclose(clip.images(images), nn.functional.normalize(pictures), atol=1e-6)
    assert clip.scale.item() == pytest.approx(model.logit_scale.exp().item())
    # equal texts once, whatever their order and the padding of their batch
    texts = clip.texts(["a dog", "a red cat", "a dog", "b"])
    alone = [clip.texts([text]) for text in ("a dog", "a red cat", "a dog", "b")]
    assert torch.allclose(texts, torch.cat(alone), atol=1e-6)
    assert float((texts[0] - texts[1]).norm()) > 0.1


def test_half_the_memory_gives_nearly_the_same(folder, images):
    clip = load_clip(folder)
    whole = clip.images(images)
    half = clip.to(torch.bfloat16).images(images)
    assert half.dtype == torch.float32
    assert torch.allclose(half, whole, atol=0.03) and not torch.equal(half, whole)


def test_a_long_text_is_cut_with_a_warning(folder):
    clip = load_clip(folder)
    with pytest.warns(UserWarning, match=r"14 tokens is longer than the 10 .*: 'dogs'$"):
        cut = clip.texts(["a cat", "red catty dogs"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = clip.texts(["a cat", "red catty"])
    assert torch.allclose(cut, kept, atol=1e-6)


def test_means_and_deviations_are_those_of_the_source(folder, tmp_path):
    save_clip(tmp_path)
    given = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given))
    preparation = load_clip(tmp_path).preparation
    assert preparation.mean == (0.5, 0.5, 0.5) and preparation.std == (0.5, 0.25, 0.5)
    assert load_clip(folder).preparation == Preparation(SIDE, MEAN, STD)


def test_a_model_without_a_tokenizer_reads_images_only(folder, images, tmp_path):
    tiny_clip().save_pretrained(tmp_path)
    clip = load_clip(tmp_path)
    assert torch.equal(clip.images(images), load_clip(folder).images(images))
    with pytest.raises(InputError, match="no tokenizer"):
        clip.texts(["a cat"])
    assert load_clip(tmp_path, processor=folder).texts(["a cat"]).shape == (1, 8)


def test_what_is_no_clip_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="no CLIP model can be read"):
        load_clip(tmp_path)
    half = {k: v for k, v in tiny_clip().state_dict().items() if not k.startswith("vision")}
    tiny_clip().save_pretrained(tmp_path, state_dict=half)
    with pytest.raises(InputError, match="lacks .* weights of a CLIP"):
        load_clip(tmp_path)
    with pytest.raises(InputError, match="batch of 0"):
        load_clip(folder, batch=0)


def test_images_must_be_colours_in_unit_range(folder, images):
    for wrong in (images[:, :1], images[0], (images * 255).byte()):
        with pytest.raises(InputError, match="CLIP needs float values"):
            load_clip(folder).images(wrong)
