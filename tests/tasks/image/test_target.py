"""Targets: what is rewarded, for which conditions, and what the data points belong to."""

import pytest
import torch

from rtb_rl.core import ConditionalLogZ, GroupMeanLogZ
from rtb_rl.errors import InputError
from rtb_rl.nn.convolution import ConvClassifier
from rtb_rl.tasks.image.measurements import (
    GaussianBlur,
    Inpainting,
    Measurement,
    SuperResolution,
)
from rtb_rl.tasks.image.target import (
    class_target,
    every_class_target,
    measurement_target,
    reward_target,
)

CLASSES = 5
MASK = torch.arange(64).reshape(8, 8) % 3 == 0


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def classifier():
    found = ConvClassifier((1, 8, 8), CLASSES, width=4, generator=seeded())
    found.temperature.fill_(0.05)  # so that its classes differ
    return found.requires_grad_(False)


@pytest.fixture(scope="module")
def points():
    """In model space, some of them outside [-1, 1]."""
    return 0.8 * torch.randn((40, 1, 8, 8), generator=seeded(1))


def probabilities(classifier, points):
    return classifier((points / 2 + 0.5).clamp(0, 1)).double().softmax(-1)


def test_a_union_is_rewarded_by_the_probability_of_any_of_its_classes(classifier, points):
    target = class_target(classifier, [1, 3])
    expected = probabilities(classifier, points)[:, [1, 3]].sum(1).log()
    found = target.log_reward(points, None).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert target.name == "class 1+3" and not target.is_conditional
    assert target.draw_conditions(7, generator=seeded()) == (None, None)


def test_a_class_named_twice_counts_once(classifier, points):
    twice = class_target(classifier, [1, 3, 1])
    once = class_target(classifier, [1, 3])
    assert twice.log_reward(points, None).equal(once.log_reward(points, None))
    assert class_target(classifier, range(CLASSES)).log_reward(points, None).abs().max() < 1e-5


def test_classes_that_do_not_exist_are_refused(classifier):
    with pytest.raises(InputError, match=r"no class 5: the classifier has labels 0 to 4"):
        class_target(classifier, [0, 5])
    with pytest.raises(InputError, match=r"no class 5, 6: the classifier has labels 0 to 4"):
        every_class_target(classifier, 7)
    with pytest.raises(InputError, match="give at least one label"):
        class_target(classifier, [])


def test_every_class_is_drawn_as_often_and_rewarded_by_its_own_probability(classifier, points):
    target = every_class_target(classifier, CLASSES)
    labels, x0 = target.draw_conditions(20_000, generator=seeded(3))
    assert x0 is None and labels.dtype == torch.int64
    count = torch.bincount(labels, minlength=CLASSES)
    assert len(count) == CLASSES
    chi_square = ((count - 4000).square() / 4000).sum()
    assert chi_square < 18.5  # p = 0.001 at 4 degrees of freedom
    asked = labels[: len(points)]
    expected = probabilities(classifier, points).gather(1, asked[:, None]).squeeze(1).log()
    found = target.log_reward(points, asked).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert target.is_conditional and target.encode(asked).class_labels.equal(asked)
    log_z = target.log_z(1)
    assert isinstance(log_z, ConditionalLogZ)
    assert log_z(asked, torch.zeros(len(asked))).eq(0).all()


@pytest.mark.parametrize(
    "operator", [Inpainting(MASK), SuperResolution(2), GaussianBlur(1.0)], ids=lambda o: type(o)
)
def test_each_observation_comes_with_the_image_that_it_was_made_of(operator):
    sigma = 0.1
    draws = torch.rand((6, 1, 8, 8), generator=seeded(5)) * 2 - 1
    target = measurement_target(Measurement(operator, sigma), draws)
    condition, x0 = target.draw_conditions(300, generator=seeded(6))
    source = (x0[:, None] == draws).flatten(2).all(2)
    assert source.sum(1).eq(1).all(), "a data point that is no draw of the prior"
    assert source.sum(0).ge(25).all(), "a draw that is hardly ever observed"
    noise = (condition["observation"] - operator.apply(x0)) / sigma
    assert noise.abs().max() < 6
    assert abs(float(noise.mean())) < 4 / noise.numel() ** 0.5
    assert abs(float(noise.square().mean()) - 1) < 4 * (2 / noise.numel()) ** 0.5
    channels = target.encode(condition).channels
    assert channels.shape[0] == 300 and channels.shape[2:] == (8, 8)
    likelihood = (
        -noise.square().flatten(1).sum(1) / 2
        - noise[0].numel() * torch.tensor(sigma * (2 * torch.pi) ** 0.5).log()
    )
    torch.testing.assert_close(target.log_reward(x0, condition), likelihood, atol=1e-3, rtol=1e-4)
    assert isinstance(target.log_z(2), GroupMeanLogZ)
    with pytest.raises(InputError, match="the mix has 1; give a mix of 2 paths or more"):
        target.log_z(1)


def test_a_reward_of_one_s_own_sees_images_in_range(points):
    seen = []

    def brightness(images, condition):
        seen.append(images)
        return images.flatten(1).mean(1)

    target = reward_target("bright", brightness)
    found = target.log_reward(points, None)
    assert float(seen[0].min()) >= 0 and float(seen[0].max()) <= 1
    torch.testing.assert_close(found, ((points + 1) / 2).clamp(0, 1).flatten(1).mean(1))
    assert not target.log_reward.differentiable
