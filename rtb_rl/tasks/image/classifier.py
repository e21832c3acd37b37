"""Classifiers of images: what rewards are made of, and what judges the samples."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Generator, Tensor
from torch.nn import functional

from rtb_rl.errors import InputError
from rtb_rl.nn.convolution import ConvClassifier
from rtb_rl.tasks.image.images import ImageDataset
from rtb_rl.tasks.image.metrics import expected_calibration_error
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.loop import train
from rtb_rl.training.rates import cosine
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import GeneratorState, generator_for
from rtb_rl.training.stage import complete, device_for_training, load_weights

TEMPERATURE_SPREAD = 0.4
BATCH = 1000  # images classified at once


class Classifier(Protocol):
    """Images [batch, channels, height, width] in [0, 1] -> logits [batch, classes]."""

    def __call__(self, images: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class ClassifierSettings:
    """How a classifier is trained. A judge should differ from the reward in seed and width."""

    steps: int = 2000
    batch: int = 128
    width: int = 32
    learning_rate: float = 2e-3
    """Falls to zero along a cosine."""
    weight_decay: float = 1e-2
    shift: int = 1
    """Largest random shift of a training image, pixels a direction."""
    held_out: float = 0.2
    """Share of the images not trained on: half sets the temperature, half measures the result."""


class ClassifierTrainer:
    """Minimises the cross-entropy of shifted images by AdamW."""

    def __init__(
        self,
        classifier: ConvClassifier,
        dataset: ImageDataset,
        settings: ClassifierSettings,
        *,
        generator: Generator,
    ):
        self.classifier, self.dataset = classifier, dataset
        self.settings, self.generator = settings, generator
        self.optimiser = torch.optim.AdamW(
            classifier.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def update(self, step: int) -> Mapping[str, Tensor]:
        """One gradient step; the loss before it."""
        settings = self.settings
        rate = cosine(settings.learning_rate, step, settings.steps)
        self.optimiser.param_groups[0]["lr"] = rate
        images, labels = self.dataset.sample(settings.batch, generator=self.generator)
        images = shifted(images, settings.shift, generator=self.generator)
        loss = functional.cross_entropy(self.classifier(images), labels)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return {"classifier/loss": loss.detach()}

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold."""
        return {
            "classifier": self.classifier,
            "optimiser": self.optimiser,
            "generator": GeneratorState(self.generator),
        }


def fit_classifier(
    directory: str | Path,
    dataset: ImageDataset,
    settings: ClassifierSettings | None = None,
    *,
    seed: int = 0,
) -> ConvClassifier:
    """A calibrated classifier of the data set's classes.

    results.json: accuracy, log-loss (nats) and expected calibration error on images that neither
    training nor the temperature saw.
    """
    settings = settings or ClassifierSettings()
    config = {
        "data": dataset.name,
        "data_sha256": dataset.sha256,
        "shape": dataset.shape,
        "classes": dataset.classes,
        "classifier": asdict(settings),
        "seed": seed,
    }
    run = Run(directory, config)
    classifier = _new_classifier(config).to(device_for_training())

    def fit() -> dict[str, Any]:
        device = classifier.temperature.device
        rest, held_out = dataset.to(device).split(settings.held_out)
        calibration, test = held_out.split(0.5)
        generator = generator_for(seed, "classifier", device=device)
        trainer = ClassifierTrainer(classifier, rest, settings, generator=generator)
        seconds = train(
            run,
            trainer.update,
            trainer.parts,
            steps=settings.steps,
            description="classifier",
            checkpoint_every=500,
        )
        logits = logits_of(classifier, calibration.images)
        classifier.temperature.fill_(calibrated_temperature(logits, calibration.labels))
        return {"seconds": seconds, **quality(classifier, test)}

    complete(run, classifier, fit)
    return classifier


def load_classifier(directory: str | Path) -> ConvClassifier:
    """The classifier that `fit_classifier` left in a directory.

    InputError where there is no finished one.
    """
    path = Path(directory)
    if not (path / "results.json").exists():
        raise InputError(
            f"{path} holds no finished classifier (no results.json); give the directory of one, or"
            " fit it first"
        )
    classifier = _new_classifier(json.loads((path / "config.json").read_text()))
    load_weights(path, classifier)
    return classifier.requires_grad_(False).eval()


@torch.no_grad()
def logits_of(classifier: Classifier, images: Tensor) -> Tensor:
    """Logits of many images, a batch at a time: [n, classes]."""
    return torch.cat([classifier(part) for part in images.split(BATCH)])


def quality(classifier: Classifier, dataset: ImageDataset) -> dict[str, float]:
    """Accuracy, log-loss (nats) and expected calibration error on a data set."""
    logits, labels = logits_of(classifier, dataset.images), dataset.labels
    return {
        "accuracy": float((logits.argmax(-1) == labels).double().mean()),
        "log_loss": float(functional.cross_entropy(logits.double(), labels)),
        "calibration_error": expected_calibration_error(logits, labels),
        "images": len(dataset),
    }


def calibrated_temperature(logits: Tensor, labels: Tensor) -> float:
    """The most probable temperature T of logits / T, a priori log T ~ N(0, TEMPERATURE_SPREAD^2).

    Temperature scaling (arXiv 1706.04599) with a prior: a few hundred images of which a good
    classifier gets three wrong say little, and without it can triple the logits. Found on a grid
    of log T from -3 to 3.
    """
    logits = logits.double()
    candidates = torch.linspace(-3, 3, 301, dtype=torch.float64).exp().tolist()

    def loss(temperature: float) -> float:
        surprise = functional.cross_entropy(logits / temperature, labels, reduction="sum")
        return float(surprise) + (math.log(temperature) / TEMPERATURE_SPREAD) ** 2 / 2

    return min(candidates, key=loss)


def shifted(images: Tensor, pixels: int, *, generator: Generator) -> Tensor:
    """Each image moved by up to `pixels` down or up and right or left, its border repeated."""
    count, _, height, width = images.shape
    device = images.device
    offset = torch.randint(2 * pixels + 1, (2, count, 1), generator=generator, device=device)
    rows = offset[0] + torch.arange(height, device=device)
    columns = offset[1] + torch.arange(width, device=device)
    padded = functional.pad(images, (pixels,) * 4, mode="replicate").movedim(1, -1)
    image = torch.arange(count, device=device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _new_classifier(config: Mapping[str, Any]) -> ConvClassifier:
    return ConvClassifier(
        tuple(config["shape"]),
        len(config["classes"]),
        width=config["classifier"]["width"],
        generator=generator_for(config["seed"], "classifier", "initial"),
    )
