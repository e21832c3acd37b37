"""What an image posterior is asked for: a reward, its conditions, and a network that can see them.

A target says how the prior's U-Net becomes the posterior's (a copy, a copy with a class embedding,
a copy that also sees an observation), so that every posterior starts as the prior.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.unets import Encode, UNetInputs, with_channels, with_classes
from rtb_rl.core import ConditionalLogZ, GroupMeanLogZ, LogReward, ScalarLogZ
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.tasks.image.measurements import (
    Measurement,
    digest,
    measurement_reward,
    operator_facts,
)
from rtb_rl.tasks.image.rewards import (
    Classifier,
    ConditionalClassProbability,
    ImageReward,
    UnionProbability,
    check_labels,
    in_model_space,
)
from rtb_rl.training.mix import LearnedLogZ
from rtb_rl.training.scoring import score
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import fingerprint
from rtb_rl.training.task import DrawConditions, Task, no_conditions

with extra("image"):
    from diffusers.models.unets.unet_2d import UNet2DModel


@dataclass(frozen=True)
class ImageTarget:
    """p(x) r(x | c)^beta / Z(c) over images in model space, [-1, 1]."""

    name: str
    log_reward: LogReward
    draw_conditions: DrawConditions = no_conditions
    widen: Callable[[UNet2DModel], UNet2DModel] = copy.deepcopy
    """The prior's U-Net -> the posterior's, which starts as the same function."""
    encode: Encode | None = None
    """How the posterior's U-Net is told the condition."""
    classes: int | None = None
    """How many conditions there are, where they can be counted: 0..classes - 1."""
    log_z: Callable[[int], LearnedLogZ] = lambda paths: ScalarLogZ()
    """The estimate of log Z for so many paths a condition."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a directory of this target belongs to, beside the name."""

    @property
    def is_conditional(self) -> bool:
        return self.encode is not None


def reward_target(name: str, reward: ImageReward) -> ImageTarget:
    """A reward of your own, `(images [batch, C, H, W] in [0, 1], None) -> log r [batch]`.

    A directory knows it by its name alone: another reward needs another one.
    """
    return ImageTarget(name, in_model_space(reward))


def class_target(classifier: Classifier, labels: Sequence[int]) -> ImageTarget:
    """r(x) = p(one of `labels` | x). InputError for labels that the classifier does not have.

    A classifier of images of another size is refused by `fit_posterior`, which knows the prior.
    """
    labels = tuple(dict.fromkeys(labels))
    name = "class " + "+".join(str(label) for label in labels)
    target = reward_target(name, UnionProbability(classifier, labels))
    return replace(target, facts={"classifier": fingerprint(classifier)})


def every_class_target(classifier: Classifier, classes: int) -> ImageTarget:
    """One posterior for all classes: r(x | c) = p(c | x), the class c drawn uniformly.

    InputError for more classes than the classifier has.
    """
    check_labels(classifier, range(classes))

    def draw(n: int, *, generator: Generator) -> tuple[Condition, None]:
        device = generator.device
        return torch.randint(classes, (n,), generator=generator, device=device), None

    def log_z(paths: int) -> LearnedLogZ:
        return ConditionalLogZ(ClassTable(classes))

    return ImageTarget(
        "every class",
        in_model_space(ConditionalClassProbability(classifier)),
        draw,
        lambda unet: with_classes(unet, classes),
        _labels,
        classes,
        log_z,
        {"classifier": fingerprint(classifier)},
    )


def measurement_target(measurement: Measurement, draws: Tensor) -> ImageTarget:
    """The posterior of an image given y = A x + noise, for any y.

    `draws` of the prior [n, C, H, W] make the observations it is trained on; each is an exact
    posterior draw for its own observation, and comes with it as a data point.
    """
    probe = measurement.as_image(measurement.apply(draws[:1]))

    def draw(n: int, *, generator: Generator) -> tuple[Condition, Tensor]:
        index = torch.randint(len(draws), (n,), generator=generator, device=generator.device)
        x0 = draws[index]
        return {"observation": measurement.observe(x0, generator=generator)}, x0

    def encode(condition: Condition) -> UNetInputs:
        assert isinstance(condition, dict)
        return UNetInputs(channels=measurement.as_image(condition["observation"]))

    return ImageTarget(
        type(measurement.operator).__name__,
        measurement_reward(measurement),
        draw,
        lambda unet: with_channels(unet, probe.shape[1]),
        encode,
        log_z=_group_mean,
        facts={
            "operator": operator_facts(measurement.operator),
            "sigma": measurement.sigma,
            "draws": digest(draws),
        },
    )


def check_reward(task: Task, *, seed: int) -> None:
    """InputError or NonFiniteError unless the reward has one number for each of two images."""
    generator = generator_for(seed, "check", device=next(task.posterior.parameters()).device)
    condition, x0 = task.draw_conditions(2, generator=generator)
    x0 = task.diffusion.start(2, generator=generator) if x0 is None else x0
    try:
        score(task, x0, condition)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"the reward of target {task.name!r} fails on images of shape {tuple(x0.shape[1:])},"
            f" which the prior makes ({reason}); give a reward or classifier made for such images"
        ) from error


def _group_mean(paths: int) -> LearnedLogZ:
    if paths < 2:
        raise InputError(
            f"log Z of an observation is the mean over its paths, and the mix has {paths}; give a"
            " mix of 2 paths or more"
        )
    return GroupMeanLogZ(paths)


class ClassTable(nn.Module):
    """One learned number a class, zero at first: labels [batch] -> [batch]."""

    def __init__(self, classes: int):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(classes))

    def forward(self, labels: Tensor) -> Tensor:
        return self.values[labels]


def _labels(condition: Condition) -> UNetInputs:
    assert isinstance(condition, Tensor)
    return UNetInputs(class_labels=condition)
