"""ImageReward through the form of its package, of which a small copy stands in."""

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from rtb_rl.adapters.image_reward import ImageRewardScore, image_reward
from rtb_rl.errors import InputError

PROMPTS = ["a cat", "a dog", "a cat", "a sea"]


class Scorer(nn.Module):
    """`score` as in the package: numbers for a list, the bare number for a list of one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls = []

    def score(self, prompt, image):
        assert type(image) is list and all(one.mode == "RGB" for one in image)
        self.calls.append((prompt, len(image)))
        values = [float(np.asarray(one)[..., 0].mean()) + len(prompt) for one in image]
        return torch.squeeze(torch.tensor(values)).tolist()


@pytest.fixture
def images():
    return torch.rand(4, 3, 6, 9, generator=torch.Generator().manual_seed(0))


def expected(images):
    red = (images[:, 0] * 255).round().mean((1, 2))
    return red + torch.tensor([float(len(prompt)) for prompt in PROMPTS])


def test_each_image_is_scored_as_a_picture_for_its_prompt(images):
    model = Scorer().train()
    reward = image_reward(model)
    found = reward(images.requires_grad_(), PROMPTS, [{}] * 4)
    assert torch.allclose(found, expected(images.detach()), atol=1e-3)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert not reward.differentiable
    assert model.calls == [("a cat", 2), ("a dog", 1), ("a sea", 1)]
    assert not model.training and not model.weight.requires_grad


def test_any_object_of_that_form_serves(images):
    model = types.SimpleNamespace(score=Scorer().score)
    assert torch.allclose(image_reward(model)(images, PROMPTS), expected(images), atol=1e-3)
    with pytest.raises(InputError, match="int has no score"):
        image_reward(3)


def test_a_wrong_count_of_scores_or_prompts_is_refused(images):
    one = ImageRewardScore(types.SimpleNamespace(score=lambda prompt, pictures: 0.5))
    with pytest.raises(InputError, match="1 scores for 2 pictures"):
        one(images, PROMPTS)
    with pytest.raises(InputError, match="4 images came with 3 prompts"):
        one(images, PROMPTS[:3])


def test_a_name_is_loaded_by_the_package(images, monkeypatch):
    asked = []
    package = types.ModuleType("ImageReward")
    package.load = lambda name: asked.append(name) or Scorer()
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    found = image_reward()(images, PROMPTS)
    assert asked == ["ImageReward-v1.0"] and torch.allclose(found, expected(images), atol=1e-3)

    def refuse(name):
        raise RuntimeError(f"Model {name} not found")

    package.load = refuse
    with pytest.raises(InputError, match="doesn't load 'nowhere.pt'.*not found.*ImageReward.pt"):
        image_reward("nowhere.pt")


def test_a_package_that_is_missing_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(InputError, match="can't be imported .*old transformers.*pick_score"):
        image_reward()
