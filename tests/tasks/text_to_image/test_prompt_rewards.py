"""The form of rewards with prompts, and what the checks refuse."""

import numpy as np
import pytest
import torch

from rtb_rl.errors import InputError, NonFiniteError
from rtb_rl.tasks.image.rewards import Brightness, jpeg_compressibility, jpeg_incompressibility
from rtb_rl.tasks.text_to_image.rewards import CheckedReward, without_prompt

PROMPTS = ["a cat", "a dog", "a house"]


@pytest.fixture
def images():
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def mean_red(images, prompts, metadata):
    return images[:, 0].mean((1, 2))


def differentiable(reward):
    reward.differentiable = True
    return reward


# what a plain function may return for three images: values, and what it reports
FORMS = {
    "tensor": lambda images, prompts, metadata: torch.tensor([1.0, 2.0, 3.0]),
    "half": lambda images, prompts, metadata: torch.tensor([1.0, 2.0, 3.0]).half(),
    "whole numbers": lambda images, prompts, metadata: torch.tensor([1, 2, 3]),
    "array": lambda images, prompts, metadata: np.array([1.0, 2.0, 3.0]),
    "list": lambda images, prompts, metadata: [1, 2.0, 3],
    "list of tensors": lambda images, prompts, metadata: [torch.tensor(i + 1.0) for i in range(3)],
    "of prompts": lambda images, prompts, metadata: [" ".join(prompts).index(p) for p in prompts],
    "of metadata": lambda images, prompts, metadata: [one["mark"] for one in metadata],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_info", [False, True])
def test_any_form_of_numbers_becomes_one_tensor(images, form, with_info):
    def reward(*given):
        rewards = FORMS[form](*given)
        return (rewards, {"seen": len(given[1])}) if with_info else rewards

    metadata = [{"mark": 1.0}, {"mark": 2.0}, {"mark": 3.0}]
    log_r, info = CheckedReward(reward)(images, PROMPTS, metadata)
    expected = [0, 6, 12] if form == "of prompts" else [1, 2, 3]
    assert log_r.tolist() == expected and log_r.dtype == torch.float32
    assert info == ({"seen": 3} if with_info else {})


def test_a_pair_of_numbers_is_the_reward_of_two_images(images):
    log_r, info = CheckedReward(lambda *given: (0.5, 0.25))(images[:2], PROMPTS[:2])
    assert log_r.tolist() == [0.5, 0.25] and info == {}
    assert CheckedReward(lambda *given: ([0.5, 1.0], None))(images[:2], PROMPTS[:2])[1] == {}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 value for 3 images"),
        (torch.zeros(5), "returned 5 values for 3 images"),
        (torch.zeros(3, 1), r"returned values of shape \(3, 1\) for 3 images"),
        (0.5, "returned 1 value for 3 images"),
        (None, "returned NoneType"),
        ("good", "returned str"),
        ([1.0, None, 2.0], "returned list"),
        (torch.zeros(3, dtype=torch.complex64), "complex"),
    ],
)
def test_what_is_not_a_number_an_image_is_refused(images, returned, message):
    with pytest.raises(InputError, match=message):
        CheckedReward(lambda *given: returned)(images, PROMPTS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_with_the_first_prompt(images, bad):
    with pytest.raises(NonFiniteError, match=rf"image 1 of 3 is {bad}.*'a dog'.*2 such images"):
        CheckedReward(lambda *given: [0.0, bad, bad])(images, PROMPTS)


def test_minus_infinity_is_let_through(images):
    log_r, _ = CheckedReward(lambda *given: [0.0, -float("inf"), 1.0])(images, PROMPTS)
    assert log_r.tolist() == [0.0, -float("inf"), 1.0]


@pytest.mark.parametrize(
    ("prompts", "metadata"),
    [(PROMPTS[:2], None), ("a cat", None), (PROMPTS, [{}])],
)
def test_images_prompts_and_metadata_must_be_as_many(images, prompts, metadata):
    with pytest.raises(InputError, match="3 images came with"):
        CheckedReward(mean_red)(images, prompts, metadata)


@pytest.mark.parametrize("images", [torch.zeros(3, 1, 4, 4), torch.zeros(3, 3, 4, 4).byte()])
def test_images_must_be_colours_in_unit_range(images):
    with pytest.raises(InputError, match="float values"):
        CheckedReward(mean_red)(images, PROMPTS)


def test_gradients_reach_the_images_of_a_differentiable_reward(images):
    images.requires_grad_()
    reward = CheckedReward(differentiable(lambda *given: mean_red(*given)))
    assert reward.differentiable
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS)[0].sum(), images)
    assert torch.allclose(gradient[:, 0], torch.full((3, 8, 8), 1 / 64))
    assert bool((gradient[:, 1:] == 0).all())
    listed = CheckedReward(differentiable(lambda *given: list(mean_red(*given))))
    assert torch.equal(torch.autograd.grad(listed(images, PROMPTS)[0].sum(), images)[0], gradient)
    with torch.no_grad():
        assert not reward(images, PROMPTS)[0].requires_grad


def test_a_black_box_gets_no_gradient_and_a_lost_one_is_told(images):
    images.requires_grad_()
    seen = []

    def reward(*given):
        seen.append(torch.is_grad_enabled())
        return mean_red(*given)

    checked = CheckedReward(reward)
    assert not checked.differentiable
    assert not checked(images, PROMPTS)[0].requires_grad and seen == [False]
    lost = CheckedReward(differentiable(lambda *given: mean_red(*given).tolist()))
    with pytest.raises(InputError, match="carry no gradient"):
        lost(images, PROMPTS)
    with torch.no_grad():
        assert lost(images, PROMPTS)[0].shape == (3,)


def test_rewards_of_images_alone_serve(images):
    small, large = (
        CheckedReward(without_prompt(reward(scale=2.0)))(images, PROMPTS)[0]
        for reward in (jpeg_compressibility, jpeg_incompressibility)
    )
    assert torch.equal(small, -large)
    assert torch.equal(small, jpeg_compressibility(scale=2.0)(images, None))
    assert not without_prompt(jpeg_compressibility()).differentiable
    assert without_prompt(Brightness()).differentiable
