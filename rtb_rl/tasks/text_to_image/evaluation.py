"""How images of a prompt compare with the posterior asked for, as importance sampling gives it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rtb_rl.baselines.selection import ImportanceReference
from rtb_rl.tasks.image.evaluation import Row, collapsed, excess
from rtb_rl.tasks.image.metrics import diversity, total_variation, weighted_diversity
from rtb_rl.tasks.text_to_image.target import LatentReward
from rtb_rl.training.scoring import LOG_REWARD_FLOOR

QUANTILES = (0.05, 0.5, 0.95)
FIELDS = 8  # a side, of the images that are compared without an embedder
DIVERSITY_DRAWS = 1000

Embed = Callable[[Tensor], Tensor]
"""Images [n, 3, H, W] in [0, 1] -> features [n, d], of which cosine distances are taken."""


def pixel_fields(images: Tensor) -> Tensor:
    """Colours averaged over 8 x 8 fields, as differences from grey: [n, 192]."""
    return functional.adaptive_avg_pool2d(images, FIELDS).flatten(1) - 0.5


@dataclass(frozen=True)
class Measured:
    """Of images, one row each: log r in nats, features, and class probabilities if there are
    classes.
    """

    log_reward: Tensor
    features: Tensor
    probabilities: Tensor | None


@dataclass(frozen=True)
class Measure:
    """Decodes latents and measures the images; `log_probs` are those of classes of images."""

    log_reward: LatentReward
    embed: Embed
    log_probs: Callable[[Tensor], Tensor] | None
    batch: int

    @torch.no_grad()
    def __call__(self, x0: Tensor, number: int, log_reward: Tensor | None = None) -> Measured:
        """Of latents [n, C, h, w] of the prompt `number`; `log_reward` where it is known."""
        rewards, features, probabilities = [], [], []
        log_probs = self.log_probs
        for part in x0.split(self.batch):
            images = self.log_reward.prior.decode(part)
            if log_reward is None:
                condition = torch.full((len(part),), number, device=part.device)
                found = self.log_reward.of_images(images, condition)
                rewards.append(found.clamp(min=LOG_REWARD_FLOOR))
            features.append(self.embed(images))
            if log_probs is not None:
                probabilities.append(log_probs(images).double().exp())
        return Measured(
            torch.cat(rewards) if log_reward is None else log_reward,
            torch.cat(features),
            torch.cat(probabilities) if probabilities else None,
        )


@dataclass(frozen=True)
class Reference:
    """The target of one prompt: weighted draws of the prior, measured."""

    draws: ImportanceReference
    measured: Measured

    def mean(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The target's mean of values [n, ...], and its standard error."""
        mean, error = self.draws.mean(values.unsqueeze(0).double())
        return mean[0], error[0]


def compare(found: Measured, reference: Reference, source: Tensor | None = None) -> Row:
    """Images of one prompt against the target.

    `log_reward` with its standard error and its excess over the reference in standard errors;
    `low`, `median`, `high`: its 5, 50 and 95 % quantiles; `diversity`, the mean pairwise cosine
    distance of the features, and that of the reference; `tv` between the mean class probabilities,
    where there are classes; `collapsed`, 1 where the reward is above the reference by more than its
    error explains. `source` [n] as `Draws` has it.
    """
    wanted_reward = reference.mean(reference.measured.log_reward)
    row = excess("log_reward", found.log_reward, *wanted_reward, source)
    marks = torch.tensor(QUANTILES, dtype=torch.float64, device=found.log_reward.device)
    quantiles = found.log_reward.double().quantile(marks).tolist()
    spread = diversity(found.features[:DIVERSITY_DRAWS])
    wanted = weighted_diversity(reference.measured.features, reference.draws.log_weight[0])
    row |= dict(zip(("low", "median", "high"), quantiles, strict=True))
    row |= {
        "diversity": spread.mean,
        "diversity_error": spread.standard_error if source is None else None,
        "reference_diversity": wanted,
        "collapsed": collapsed(row),
    }
    if found.probabilities is not None and reference.measured.probabilities is not None:
        shares, _ = reference.mean(reference.measured.probabilities)
        row["tv"] = total_variation(found.probabilities.mean(0), shares)
    return row
