"""Rewards on images: their values in closed form, and whether gradients reach the image."""

import io

import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributions import Categorical

from rtb_rl.errors import InputError
from rtb_rl.nn.convolution import ConvClassifier
from rtb_rl.tasks.image.rewards import (
    Brightness,
    ClassProbability,
    Colour,
    ConditionalClassProbability,
    MaxProbability,
    UnionProbability,
    in_model_space,
    jpeg_compressibility,
    jpeg_incompressibility,
)

CLASSIFIER = ConvClassifier((3, 8, 8), 5, width=4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([3, 0, 1, 4])


@pytest.fixture
def images():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


REWARDS = {
    "class": ClassProbability(CLASSIFIER, 2),
    "union": UnionProbability(CLASSIFIER, [0, 2, 4]),
    "max": MaxProbability(CLASSIFIER, [0, 2, 4]),
    "conditional": ConditionalClassProbability(CLASSIFIER),
    "compressibility": jpeg_compressibility(),
    "incompressibility": jpeg_incompressibility(quality=50, scale=2.0),
    "brightness": Brightness(3.0),
    "colour": Colour((0.9, 0.1, 0.5), 4.0),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_says_truly_whether_gradients_reach_the_image(images, name):
    for reward, points in ((REWARDS[name], images), (in_model_space(REWARDS[name]), images - 0.5)):
        points = points.clone().requires_grad_()
        log_r = reward(points, LABELS)
        assert log_r.shape == (4,) and log_r.dtype == torch.float32
        assert log_r.requires_grad == reward.differentiable
        if reward.differentiable:
            log_r.sum().backward()
            assert points.grad is not None
            assert bool((points.grad.flatten(1).abs().sum(1) > 0).all())


@pytest.mark.parametrize("name", REWARDS)
def test_each_image_alone_decides_its_reward(images, name):
    alone = [REWARDS[name](images[i : i + 1], LABELS[i : i + 1]) for i in range(4)]
    assert torch.allclose(torch.cat(alone), REWARDS[name](images, LABELS), atol=1e-6)


def test_class_rewards_are_the_classifiers_probabilities(images):
    law = Categorical(logits=CLASSIFIER(images))
    assert torch.allclose(REWARDS["class"](images, None), law.log_prob(torch.tensor(2)))
    chosen = law.probs[:, [0, 2, 4]]
    assert torch.allclose(REWARDS["union"](images, None), chosen.sum(1).log())
    assert torch.allclose(REWARDS["max"](images, None), chosen.amax(1).log())
    assert torch.allclose(REWARDS["conditional"](images, LABELS), law.log_prob(LABELS))


def test_the_union_of_all_classes_is_certain_and_the_maximum_is_below_it(images):
    union, most = (
        kind(CLASSIFIER, range(5))(images, None) for kind in (UnionProbability, MaxProbability)
    )
    assert torch.allclose(union, torch.zeros(4), atol=1e-6)
    assert bool((most < -0.1).all())


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_rewards_are_kilobytes_of_the_file(images, channels):
    images = images[:, :channels]
    sizes = []
    for image in images:
        array = (image * 255).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(array[..., 0] if channels == 1 else array).save(file, "JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    assert jpeg_compressibility()(images, None).tolist() == pytest.approx([-s for s in sizes])
    assert jpeg_incompressibility(scale=3.0)(images, None).tolist() == pytest.approx(
        [3 * s for s in sizes]
    )


def test_noise_makes_larger_files_than_a_plain_image(images):
    pair = torch.stack([images[0], torch.full_like(images[0], 0.5)])
    noisy, plain = jpeg_compressibility()(pair, None)
    assert noisy < plain


def test_brightness_and_colour():
    grey = torch.full((2, 3, 4, 4), 0.25)
    grey[1, 0] = 1.0
    assert Brightness(-2.0)(grey, None).tolist() == pytest.approx([-0.5, -1.0])
    found = Colour((1.0, 0.25, 0.0), 2.0)(grey, None)
    assert found.tolist() == pytest.approx([-2 * (0.75**2 + 0.25**2), -2 * 0.25**2])


def test_points_outside_the_valid_range_count_as_its_border():
    x = torch.tensor([-1.0, 0.0, 1.0, 5.0, -9.0]).reshape(5, 1, 1, 1).expand(-1, 1, 2, 2)
    assert in_model_space(Brightness())(x, None).tolist() == [0.0, 0.5, 1.0, 1.0, 0.0]


def test_a_plain_function_is_a_reward_and_a_black_box(images):
    reward = in_model_space(lambda images, condition: images.amax((1, 2, 3)))
    assert reward(2 * images - 1, None).tolist() == pytest.approx(images.amax((1, 2, 3)).tolist())
    assert not reward.differentiable


def test_classes_that_do_not_exist_are_refused_before_the_first_image():
    for make in (
        lambda: ClassProbability(CLASSIFIER, 5),
        lambda: UnionProbability(CLASSIFIER, [0, 5]),
        lambda: MaxProbability(CLASSIFIER, [0, 5]),
    ):
        with pytest.raises(InputError, match="no class 5: the classifier has labels 0 to 4"):
            make()
    with pytest.raises(InputError, match="no class to reward"):
        UnionProbability(CLASSIFIER, [])


def test_classes_that_a_foreign_classifier_does_not_have_are_refused(images):
    foreign = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(InputError, match="no class -1, 2: the classifier has labels 0 to 1"):
        UnionProbability(foreign, [-1, 0, 2])(images, None)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        (None, "condition NoneType"),
        ({"label": LABELS}, "condition dict"),
        (LABELS[:2], r"torch.int64 \(2,\)"),
        (LABELS.float(), r"torch.float32 \(4,\)"),
        (LABELS + 3, "no class 6, 7"),
    ],
)
def test_a_condition_that_is_no_label_is_refused(images, condition, said):
    with pytest.raises(InputError, match=said):
        ConditionalClassProbability(CLASSIFIER)(images, condition)


def test_images_of_other_channels_are_refused(images):
    with pytest.raises(InputError, match="1 or 3 channels, the images have 2"):
        jpeg_compressibility()(images[:, :2], None)
    with pytest.raises(InputError, match="3 values, the images 1 channels"):
        Colour((1, 0, 0))(images[:, :1], None)
