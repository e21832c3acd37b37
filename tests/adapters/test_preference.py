"""Models of preference, against the CLIP of transformers that is below them."""

from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import SIDE, WIDTH, save_clip, tiny_clip, tiny_tokenizer
from torch import nn

from rtb_rl.adapters.clip import Preparation, pad_square
from rtb_rl.adapters.open_clip import from_open_clip
from rtb_rl.adapters.preference import (
    clip_embedder,
    clip_score,
    hps,
    laion_aesthetic,
    linear_head,
    pick_score,
)
from rtb_rl.errors import InputError

PROMPTS = ["a cat", "a dog", "a cat", "the sea"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def images():
    return torch.rand(4, 3, 30, 41, generator=torch.Generator().manual_seed(1))


def logits(pixels, prompts):
    """What transformers itself says of each image and its own prompt."""
    tokens = tiny_tokenizer()(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return tiny_clip()(**tokens, pixel_values=pixels).logits_per_image.diagonal()


def test_scores_are_the_logits_of_the_model(folder, images):
    pixels = Preparation(SIDE)(images)
    expected = logits(pixels, PROMPTS)
    for score in (clip_score(folder), pick_score(folder, processor=folder)):
        assert torch.allclose(score(images, PROMPTS, [{}] * 4), expected, atol=1e-5)
    assert float(expected.std()) > 0.1  # images and prompts differ
    cosines = expected / tiny_clip().logit_scale.detach().exp()
    assert torch.allclose(clip_score(folder, scale=1.0)(images, PROMPTS), cosines, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_size_of_a_batch_changes_nothing(folder, images, batch):
    whole = clip_score(folder)(images, PROMPTS)
    assert torch.allclose(clip_score(folder, batch=batch)(images, PROMPTS), whole, atol=1e-5)


def head_file(folder, *, widths=(WIDTH, 6, 5, 4, 3, 1), suffix="pth"):
    """A head of linear layers under the names of the published one."""
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    weights = {}
    for number, layer in zip((0, 2, 4, 6, 7), layers, strict=False):
        weights |= {f"layers.{number}.{name}": value for name, value in layer.state_dict().items()}
    path = folder / f"head.{suffix}"
    save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
    return path, nn.Sequential(*layers)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_aesthetic_mark_is_the_heads_of_unit_vectors(folder, images, tmp_path, suffix):
    path, head = head_file(tmp_path, suffix=suffix)
    vectors = clip_embedder(folder)(images)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4))
    found = laion_aesthetic(folder, head=path)(images, PROMPTS)
    assert torch.allclose(found, head(vectors).squeeze(1), atol=1e-5)
    in_folder = laion_aesthetic(folder, head=tmp_path, file=path.name)
    assert torch.equal(in_folder(images, PROMPTS), found)


def test_a_head_that_does_not_fit_is_refused(folder, tmp_path):
    path, _ = head_file(tmp_path, widths=(WIDTH + 1, 3, 1))
    with pytest.raises(InputError, match="have 8 numbers.*reads 9"):
        laion_aesthetic(folder, head=path)
    with pytest.raises(InputError, match="doesn't end in one number"):
        linear_head({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
    with pytest.raises(InputError, match="no linear layer of 4"):
        linear_head({"layers.0.weight": torch.zeros(4, 3), "layers.0.bias": torch.zeros(4)} | {
            "layers.10.weight": torch.zeros(1, 5), "layers.10.bias": torch.zeros(1)
        })  # fmt: skip
    (single,) = linear_head({"weight": torch.ones(1, 3), "bias": torch.ones(1)})
    assert single(torch.ones(1, 3)).item() == 4


def test_gradients_reach_images_and_no_weight(folder, images, tmp_path):
    path, _ = head_file(tmp_path)
    for reward in (clip_score(folder, batch=3), laion_aesthetic(folder, head=path)):
        points = images.clone().requires_grad_()
        assert reward.differentiable
        reward(points, PROMPTS).sum().backward()
        assert bool((points.grad.flatten(1).norm(dim=1) > 1e-4).all())
        assert not any(weight.requires_grad for weight in reward.parameters())
        assert not any(module.training for module in reward.clip.model.modules())
        size = 0.1  # less, and the change of float32 rewards is their rounding
        step = size * points.grad / points.grad.norm()
        change = reward(images + step, PROMPTS).sum() - reward(images - step, PROMPTS).sum()
        assert change.item() == pytest.approx(2 * size * points.grad.norm().item(), rel=0.01)


def test_prompts_must_be_as_many_as_images(folder, images):
    with pytest.raises(InputError, match="4 images came with 1 prompts"):
        clip_score(folder)(images, ["a cat"])


def in_open_clip(weights):
    """The names of open_clip for a state dict of CLIPModel, written down one by one."""
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    }
    layers = {
        "text_model.final_layer_norm": "ln_final",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
    }
    found = {new: weights[old] for old, new in names.items()}
    for kind in ("weight", "bias"):
        found |= {f"{new}.{kind}": weights[f"{old}.{kind}"] for old, new in layers.items()}
        for side, prefix in (("text_model", ""), ("vision_model", "visual.")):
            for number in range(2):
                old = f"{side}.encoder.layers.{number}."
                new = f"{prefix}transformer.resblocks.{number}."
                three = [weights[f"{old}self_attn.{one}_proj.{kind}"] for one in "qkv"]
                found[f"{new}attn.in_proj_{kind}"] = torch.cat(three)
                found[f"{new}attn.out_proj.{kind}"] = weights[f"{old}self_attn.out_proj.{kind}"]
                found[f"{new}ln_1.{kind}"] = weights[f"{old}layer_norm1.{kind}"]
                found[f"{new}ln_2.{kind}"] = weights[f"{old}layer_norm2.{kind}"]
                found[f"{new}mlp.c_fc.{kind}"] = weights[f"{old}mlp.fc1.{kind}"]
                found[f"{new}mlp.c_proj.{kind}"] = weights[f"{old}mlp.fc2.{kind}"]
    found["text_projection"] = weights["text_projection.weight"].T
    found["visual.proj"] = weights["visual_projection.weight"].T
    found["logit_scale"] = weights["logit_scale"]
    return {name: value.clone() for name, value in found.items()}


@pytest.mark.parametrize("wrapped", [False, True])
def test_hps_is_the_clip_that_its_file_holds(folder, images, tmp_path, wrapped):
    weights = in_open_clip(tiny_clip().state_dict())
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "state_dict": weights} if wrapped else weights, file)
    expected = logits(Preparation(SIDE, frame=pad_square)(images), PROMPTS)
    for source in (tmp_path, file):
        score = hps(source, processor=folder)
        assert torch.allclose(score(images, PROMPTS), expected, atol=1e-5)
    published = hps(file, processor=folder, scale=1.0)(images, PROMPTS)
    assert torch.allclose(published, expected / torch.tensor(3.0).exp(), atol=1e-6)


def test_names_of_open_clip_become_those_of_transformers():
    weights = dict(tiny_clip().state_dict())
    found = from_open_clip(in_open_clip(weights) | {"attn_mask": torch.zeros(3, 3)})
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_file_that_is_no_clip_of_open_clip_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="no weights can be read"):
        hps(tmp_path, processor=folder)
    weights = in_open_clip(tiny_clip().state_dict())
    with pytest.raises(InputError, match="'visual.attnpool.c_proj.weight'"):
        from_open_clip(weights | {"visual.attnpool.c_proj.weight": torch.zeros(1)})
    del weights["visual.proj"]
    torch.save(weights, tmp_path / "half.pt")
    with pytest.raises(InputError, match="lacks 1 weights of a CLIP .visual_projection"):
        hps(tmp_path / "half.pt", processor=folder)
