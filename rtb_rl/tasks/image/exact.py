"""The exact rung: a posterior on real images of which log Z and class masses are known.

The prior is a closed-form network behind the call of a U-Net (see smoothed), run by a DDPMScheduler
as any pipeline is; the reward is the Bayes probability of some classes. So log Z is the log share
of these classes, and each class has its share in the posterior.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.schedulers import diffusion_from_scheduler, scheduler_grid
from rtb_rl.adapters.unets import denoiser_from_unet
from rtb_rl.core import (
    ScalarLogZ,
    effective_sample_size,
    importance_log_z,
    log_weight,
    penalty_of,
    rollout_against,
    rtb,
)
from rtb_rl.tasks.image.images import ImageDataset, to_model_space
from rtb_rl.tasks.image.metrics import class_histogram, total_variation
from rtb_rl.tasks.image.reweighted import Reweighted
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

BATCH = 500  # images drawn or classified at once


@dataclass(frozen=True)
class ExactSettings:
    """The prior, the network that reweighs it, how that is trained and how much is drawn."""

    smoothing: float = 0.4
    """Standard deviation of the noise on each pixel, in model space."""
    levels: int = 50
    width: int = 256
    """Of the network."""
    draws: int = 6000
    huber_threshold: float = 5.0
    linex_limit: float = 3.0
    """Of the two penalties, see `penalty_of`; nats."""
    finetune: FinetuneSettings = field(
        default_factory=lambda: FinetuneSettings(
            updates=350,
            beta_warmup=20,
            conditions=128,
            mix=Mix(on_policy=1, data=0),
            levels_per_path=16,
            learning_rate=8e-3,
            last_learning_rate=0.02,
            log_z_learning_rate=0.05,
            gradient_clip=10.0,
            average_decay=0.97,
        )
    )


@dataclass(frozen=True)
class ExactProblem:
    """A task with all that is known of its posterior."""

    task: Task
    reward: BayesReward
    classifier: BayesClassifier

    @property
    def masses(self) -> Tensor:
        """Of each class in the posterior, its share of the points asked for: float64 [classes]."""
        labels = self.reward.labels
        chosen = labels[torch.isin(labels, torch.tensor(self.reward.classes))]
        count = torch.bincount(chosen, minlength=self.classifier.classes).double()
        return count / count.sum()

    def histogram_error(self, x0: Tensor) -> float:
        """Total variation between the classes of images [n, C, H, W], by the Bayes classifier, and
        the masses. Exact draws have that of n counts, and a little for what classes overlap.
        """
        logits = torch.cat([self.classifier(part) for part in x0.split(BATCH)])
        return total_variation(class_histogram(logits), self.masses)


def exact_problem(
    dataset: ImageDataset, classes: Sequence[int], settings: ExactSettings, *, seed: int
) -> ExactProblem:
    """p(x) p(one of `classes` | x) / Z, p the smoothed data set; the posterior starts as p.

    InputError where the data set has no image of these classes.
    """
    smoothed = SmoothedImages(to_model_space(dataset.images), settings.smoothing)
    reward = BayesReward(smoothed, dataset.labels, tuple(classes))
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing="trailing"
    )
    grid = scheduler_grid(scheduler, settings.levels)
    diffusion = diffusion_from_scheduler(scheduler, dataset.shape, levels=settings.levels)
    prior = denoiser_from_unet(SmoothedUNet(smoothed, scheduler.alphas_cumprod), scheduler, grid)
    generator = generator_for(seed, "posterior", "initial")
    posterior = Reweighted(prior, smoothed, diffusion, width=settings.width, generator=generator)
    name = f"smoothed {dataset.name}, class {'+'.join(map(str, classes))}"
    task = Task(name, diffusion, prior, posterior, reward)
    return ExactProblem(
        task, reward, BayesClassifier(smoothed, dataset.labels, len(dataset.classes))
    )


def fit_exact(
    run: Run, problem: ExactProblem, settings: ExactSettings, *, seed: int
) -> dict[str, float]:
    """Train the posterior and measure it; resumable. Log Z in nats, its errors against the exact.

    `log_z_error` of the importance-weighted log Z of `draws` paths, with its standard error;
    `learned_log_z_error`; `chain_log_z_error`, of the prior's own chain, by as many draws: what its
    few levels make different from the closed form, whatever the posterior. `tv` of the classes and
    `tv_of_exact_draws`, the floor; `ess` of the paths.
    """
    log_z = ScalarLogZ()
    finetuner = Finetuner(
        problem.task,
        log_z,
        settings.finetune,
        generator=generator_for(seed, "posterior"),
        objective=rtb(penalty_of(settings.huber_threshold, settings.linex_limit)),
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
    posterior = finetuner.average.module
    return {
        "seconds": seconds,
        "learned_log_z_error": abs(float(log_z.value.detach()) - problem.reward.log_z),
        **_measured(problem, posterior, settings, generator=generator_for(seed, "evaluation")),
    }


def _measured(
    problem: ExactProblem, posterior: nn.Module, settings: ExactSettings, *, generator: Generator
) -> dict[str, float]:
    task, reward, count = problem.task, problem.reward, settings.draws
    x0, weight = _weighted(task, posterior, count, generator=generator)
    log_z, error = importance_log_z(weight)
    _, of_prior = _weighted(task, task.prior, count, generator=generator)
    chain, chain_error = importance_log_z(of_prior)
    exact_draws = reward.posterior.sample(count, generator=generator)
    return {
        "log_z_error": abs(float(log_z) - reward.log_z),
        "log_z_standard_error": float(error),
        "chain_log_z_error": abs(float(chain) - reward.log_z),
        "chain_log_z_standard_error": float(chain_error),
        "tv": problem.histogram_error(x0),
        "tv_of_exact_draws": problem.histogram_error(exact_draws),
        "ess": float(effective_sample_size(weight)),
    }


@torch.no_grad()
def _weighted(
    task: Task, denoiser: nn.Module, count: int, *, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Draws [count, C, H, W] and their log-weights, float64 [count]."""
    draws, weights = [], []
    for begin in range(0, count, BATCH):
        paths, ratio = rollout_against(
            task.diffusion,
            denoiser,
            task.prior,
            None,
            min(BATCH, count - begin),
            generator=generator,
        )
        draws.append(paths.x0)
        weights.append(log_weight(task.log_reward(paths.x0, None), ratio, 1.0))
    return torch.cat(draws), torch.cat(weights).double()
