"""Classifiers: they learn, are calibrated and come back from files; foreign ones are checked."""

import json

import pytest
import torch
from torch import nn

from rtb_rl.errors import InputError
from rtb_rl.nn.convolution import ConvClassifier
from rtb_rl.tasks.image import classifier as classifiers
from rtb_rl.tasks.image.classifier import (
    ClassifierSettings,
    calibrated_temperature,
    fit_classifier,
    load_classifier,
    quality,
    shifted,
)
from rtb_rl.tasks.image.images import ImageDataset, load_images

SETTINGS = ClassifierSettings(steps=200, width=8)
TINY = ClassifierSettings(steps=520, width=2, batch=8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def new_classifier(shape=(1, 8, 8), classes=10, width=4, seed=0):
    return ConvClassifier(shape, classes, width=width, generator=generator(seed))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("classifier")
    return directory, fit_classifier(directory, load_images(), SETTINGS, seed=1)


@pytest.fixture
def halves():
    """Images 4x4 that are bright on the left or on the right."""
    images = torch.rand(200, 1, 4, 4, generator=generator()) / 2
    images[:100, ..., :2] += 0.3
    images[100:, ..., 2:] += 0.3
    labels = torch.arange(2).repeat_interleave(100)
    return ImageDataset("halves", images, labels, ("left", "right"))


def test_it_tells_digits_apart_that_it_has_not_seen(fitted):
    directory, classifier = fitted
    results = json.loads((directory / "results.json").read_text())
    test = load_images().split(SETTINGS.held_out)[1].split(0.5)[1]
    assert results["images"] == len(test) == 180
    measured = quality(classifier, test)
    assert measured == pytest.approx({name: results[name] for name in measured})
    assert measured["accuracy"] >= 0.9
    assert measured["calibration_error"] <= 0.05


def test_it_comes_back_from_its_files(fitted):
    directory, classifier = fitted
    images = load_images().images[:5]
    again = fit_classifier(directory, load_images(), SETTINGS, seed=1)
    for other in (load_classifier(directory), again):
        assert other(images).equal(classifier(images))
        assert not any(weight.requires_grad for weight in other.parameters())


def test_a_directory_of_other_settings_or_none_is_refused(fitted, tmp_path):
    with pytest.raises(InputError, match="seed was 1 and is now 2"):
        fit_classifier(fitted[0], load_images(), SETTINGS, seed=2)
    with pytest.raises(InputError, match=r"no finished classifier \(no results.json\)"):
        load_classifier(tmp_path)


def test_an_interrupted_fit_ends_like_one_that_was_not(halves, tmp_path, monkeypatch):
    whole = fit_classifier(tmp_path / "whole", halves, TINY)
    update = classifiers.ClassifierTrainer.update

    def interrupted(self, step):
        if step == 510:
            raise KeyboardInterrupt
        return update(self, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(classifiers.ClassifierTrainer, "update", interrupted)
        fit_classifier(tmp_path / "cut", halves, TINY)
    resumed = fit_classifier(tmp_path / "cut", halves, TINY)
    for name, weight in whole.state_dict().items():
        assert weight.equal(resumed.state_dict()[name]), name


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 9, 14)])
def test_the_network_takes_images_of_any_size(shape):
    network = new_classifier(shape, classes=7)
    images = torch.rand(3, *shape, generator=generator())
    features = network.features(images)
    assert features.shape == (3, 16)
    network.temperature.fill_(2.0)
    assert torch.allclose(network(images), network.last(features) / 2)
    alone = torch.cat([network(image[None]) for image in images])
    assert torch.allclose(network(images), alone, atol=1e-6)


def test_the_first_weights_are_the_generators_and_keep_the_scale():
    states = [new_classifier(width=32, seed=seed).state_dict() for seed in (0, 0, 1)]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert not states[0]["last.weight"].equal(states[2]["last.weight"])
    features = new_classifier(width=32).features(torch.rand(100, 1, 8, 8, generator=generator()))
    assert 0.02 < float(features.detach().std()) < 2


def test_the_temperature_undoes_what_was_done_to_the_logits():
    true = 2 * torch.randn(4000, 5, generator=generator(), dtype=torch.float64)
    labels = torch.multinomial(true.softmax(-1), 1, generator=generator(1)).squeeze(1)
    for factor in (0.5, 1.0, 3.0):
        assert calibrated_temperature(factor * true, labels) == pytest.approx(factor, rel=0.06)


def test_few_images_without_an_error_do_not_make_it_certain():
    labels = torch.arange(10).repeat(2)
    logits = 3.0 * nn.functional.one_hot(labels, 10)
    assert 0.5 < calibrated_temperature(logits, labels) < 1  # without the prior: 0.05


def test_shifted_images_are_the_shifts_and_all_as_often():
    image = torch.rand(1, 2, 5, 6, generator=generator())
    padded = nn.functional.pad(image, (1, 1, 1, 1), mode="replicate")
    all_shifts = [padded[0, :, i : i + 5, j : j + 6] for i in range(3) for j in range(3)]
    moved = shifted(image.expand(9000, -1, -1, -1), 1, generator=generator())
    counts = [int((moved == one).flatten(1).all(1).sum()) for one in all_shifts]
    assert sum(counts) == 9000
    assert sum((count - 1000) ** 2 for count in counts) / 1000 < 27  # chi^2, 8 degrees: p = 0.0007
    assert shifted(image, 0, generator=generator()).equal(image)
