"""The exact rung: a posterior on real images of which log Z and class masses are known.

The prior is a closed-form network behind the call of a U-Net (see smoothed), run by a DDPMScheduler
as any pipeline is; the reward is the Bayes probability of some classes. So log Z is the log share
of these classes, and each class has its share in the posterior.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.schedulers import diffusion_from_scheduler, scheduler_grid
from rtb_rl.adapters.unets import denoiser_from_unet
from rtb_rl.core import ScalarLogZ, huber, rtb
from rtb_rl.core.protocols import Condition
from rtb_rl.nn import Correction, ResidualMLP
from rtb_rl.tasks.image.images import ImageDataset, to_model_space
from rtb_rl.tasks.image.metrics import class_histogram, total_variation
from rtb_rl.tasks.image.smoothed import (
    BayesClassifier,
    BayesReward,
    SmoothedImages,
    SmoothedUNet,
)
from rtb_rl.training.finetune import Finetuner
from rtb_rl.training.loop import train
from rtb_rl.training.mix import Mix
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.settings import FinetuneSettings
from rtb_rl.training.task import Task

with extra("image"):
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

BATCH = 1000  # images drawn at once


@dataclass(frozen=True)
class ExactSettings:
    """The prior, the network that corrects it, and how that is trained."""

    smoothing: float = 0.25
    """Standard deviation of the noise on each pixel, in model space."""
    levels: int = 25
    width: int = 256
    """Of the network."""
    huber_threshold: float = 5.0
    """Residuals beyond it, in nats, are penalised linearly."""
    finetune: FinetuneSettings = field(
        default_factory=lambda: FinetuneSettings(
            updates=600,
            beta_warmup=100,
            conditions=128,
            mix=Mix(on_policy=1, data=0),
            levels_per_path=None,
            learning_rate=1e-3,
            last_learning_rate=0.05,
            log_z_learning_rate=0.05,
            average_decay=0.99,
        )
    )


class OnPixels(nn.Module):
    """A network of vectors, on images: [batch, C, H, W] -> the same."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        return self.network(x.flatten(1), level, condition).reshape(x.shape)


@dataclass(frozen=True)
class ExactProblem:
    """A task with all that is known of its posterior."""

    task: Task
    reward: BayesReward
    classifier: BayesClassifier

    @property
    def shares(self) -> Tensor:
        """The mass of each class in the posterior: float64 [classes]."""
        chosen = torch.isin(self.reward.labels, torch.tensor(self.reward.classes))
        count = torch.bincount(self.reward.labels[chosen], minlength=self.classifier.classes)
        return count.double() / count.sum()

    def histogram_error(self, x0: Tensor) -> float:
        """Total variation between the classes of images [n, C, H, W] and those of the posterior."""
        logits = torch.cat([self.classifier(part) for part in x0.split(BATCH)])
        return total_variation(class_histogram(logits), self.shares)


def exact_problem(
    dataset: ImageDataset, classes: Sequence[int], settings: ExactSettings, *, seed: int
) -> ExactProblem:
    """p(x) p(one of `classes` | x) / Z, p the data set smoothed; the posterior starts as p.

    InputError where the data set has no image of these classes.
    """
    smoothed = SmoothedImages(to_model_space(dataset.images), settings.smoothing)
    reward = BayesReward(smoothed, dataset.labels, tuple(classes))
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    grid = scheduler_grid(scheduler, settings.levels)
    diffusion = diffusion_from_scheduler(scheduler, dataset.shape, levels=settings.levels)
    prior = denoiser_from_unet(SmoothedUNet(smoothed, scheduler.alphas_cumprod), scheduler, grid)
    network = ResidualMLP(
        smoothed.points[0].numel(),
        settings.levels,
        width=settings.width,
        generator=generator_for(seed, "posterior", "initial"),
    )
    posterior = Correction(prior, OnPixels(network), diffusion)
    name = "smoothed digits, class " + "+".join(map(str, classes))
    task = Task(name, diffusion, prior, posterior, reward)
    classifier = BayesClassifier(smoothed, dataset.labels, len(dataset.classes))
    return ExactProblem(task, reward, classifier)


def fit_exact(
    run: Run, problem: ExactProblem, settings: ExactSettings, *, seed: int
) -> tuple[nn.Module, float, float]:
    """The trained posterior (the average of its weights), its log Z, seconds; resumable."""
    log_z = ScalarLogZ()
    finetuner = Finetuner(
        problem.task,
        log_z,
        settings.finetune,
        generator=generator_for(seed, "posterior"),
        objective=rtb(huber(settings.huber_threshold)),
        look_ahead=True,
    )
    seconds = train(
        run,
        finetuner.update,
        finetuner.parts,
        steps=settings.finetune.updates,
        description=problem.task.name,
        log_every=20,
        checkpoint_every=100,
    )
    return finetuner.average.module, float(log_z.value.detach()), seconds
