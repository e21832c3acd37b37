"""What a policy gradient descends: each denoising step is an action, the last point the reward.

    surrogate      pulls towards                       where it ends
    Ddpo           the largest reward                  collapsed: nothing holds the posterior back
    ClippedDdpo    the same, several passes a rollout  the same
    Dpok           reward, each step near the prior    the posterior, if log r is linear (see there)

`kl_regularised_reinforce` is the policy gradient that always ends in the posterior.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rtb_rl.core import GaussianDiffusion, GaussianKernel, Kernel, kl_reinforce_loss, log_weight
from rtb_rl.core.protocols import Objective
from rtb_rl.errors import InputError

Divergence = Callable[[Kernel, Kernel, Tensor], Tensor]
"""(posterior's kernel, prior's kernel, level) -> what each step is charged: [rows]."""


@dataclass(frozen=True)
class Steps:
    """Some steps of sampled paths, one a row.

    `kernel`: the posterior's law of x[level - 1], with graph. `log_prob`: of the point drawn, nats,
    summed over its `dimension` coordinates; `old_log_prob`: in the first pass, without graph.
    `advantage`: the path's. `prior()`: the prior's law, without graph; costs one call a row.
    """

    kernel: Kernel
    log_prob: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    level: Tensor
    dimension: int
    prior: Callable[[], Kernel]


class Surrogate(Protocol):
    """A loss of single steps, to be summed over the steps of a path."""

    @property
    def passes(self) -> int:
        """Gradient steps on the same paths."""
        ...

    def advantage(self, reward: Tensor) -> Tensor:
        """What a path gains over its group, from beta log r; both [groups, paths]."""
        ...

    def loss(self, steps: Steps) -> Tensor:
        """What is descended: [rows]."""
        ...


def standardised(reward: Tensor, limit: float) -> Tensor:
    """(reward - mean) / std within each row, clipped to +-`limit`; zero in a row of equal rewards.

    Float64 inside: a spread below 1e-6 of the largest reward counts as none.
    """
    centred = reward.double() - reward.double().mean(1, keepdim=True)
    std = centred.square().mean(1, keepdim=True).sqrt()
    least = 1e-6 * reward.double().abs().amax(1, keepdim=True)
    scaled = torch.where(std > least, centred / std, 0.0)
    return scaled.clamp(-limit, limit).to(reward.dtype)


def leave_one_out(reward: Tensor) -> Tensor:
    """Reward minus the mean of the others in its row."""
    count = reward.shape[1]
    return (reward - reward.mean(1, keepdim=True)) * count / (count - 1)


@dataclass(frozen=True)
class Ddpo:
    """-A log p_post(x[k-1] | x[k]), A the standardised reward: the score function (2305.13301).

    The sum over k is an unbiased gradient of E[A] for fixed A. No term holds the posterior near the
    prior, so it collapses onto the best points, whatever beta: standardising forgets beta.
    """

    advantage_clip: float = 5.0

    @property
    def passes(self) -> int:
        return 1

    def advantage(self, reward: Tensor) -> Tensor:
        return standardised(reward, self.advantage_clip)

    def loss(self, steps: Steps) -> Tensor:
        return -steps.advantage * steps.log_prob


@dataclass(frozen=True)
class ClippedDdpo:
    """max(-A w, -A clip(w)), w = p_new / p_old of the step: several passes a rollout (2305.13301).

    `clip_range` is per dimension. The published 1e-4 bounds a ratio of log-densities *averaged*
    over d coordinates; w has their sum and is clipped to (1 -+ clip_range)^d, which binds at the
    same steps: about 1 -+ clip_range * d where that is small. Collapses like `Ddpo`.
    """

    clip_range: float = 1e-4
    passes: int = 4
    advantage_clip: float = 5.0

    def advantage(self, reward: Tensor) -> Tensor:
        return standardised(reward, self.advantage_clip)

    def loss(self, steps: Steps) -> Tensor:
        ratio = (steps.log_prob - steps.old_log_prob).exp()
        lowest, highest = ((1 + sign * self.clip_range) ** steps.dimension for sign in (-1, 1))
        bounded = ratio.clamp(lowest, highest)
        return torch.maximum(-steps.advantage * ratio, -steps.advantage * bounded)


def gaussian_kl(kernel: Kernel, reference: Kernel, level: Tensor) -> Tensor:
    """KL(kernel | reference) of two Gaussian steps, nats: [batch].

    |m - m'|^2 / (2 s'^2) for one spread s = s'; else also (e - log(1 + e)) / 2 a coordinate, where
    e = s^2 / s'^2 - 1. InputError for other kernels.
    """
    kernel, reference = _gaussian(kernel), _gaussian(reference)
    excess = (kernel.std - reference.std) * (kernel.std + reference.std) / reference.std.square()
    shift = ((kernel.mean - reference.mean) / reference.std).square()
    return ((shift + excess - torch.log1p(excess)) / 2).flatten(1).sum(1)


def noise_difference(diffusion: GaussianDiffusion) -> Divergence:
    """|eps_post - eps_prior|^2 of the predicted noises, summed over coordinates: [batch].

    What the code published with DPOK takes for the KL: without 1 / s^2, so that its weight differs
    from level to level, and blind to the spread.
    """

    def divergence(kernel: Kernel, reference: Kernel, level: Tensor) -> Tensor:
        means = _gaussian(kernel).mean - _gaussian(reference).mean
        per_mean = diffusion.signal / (diffusion.noise * diffusion.weight_x0).clamp(min=1e-30)
        return (per_mean[level].to(means.dtype) * means).square().flatten(1).sum(1)

    return divergence


@dataclass(frozen=True)
class Dpok:
    """-reward_weight A log p_post + kl_weight KL(post step | prior step) (arXiv 2305.16381).

    A is beta log r above the mean of the others in its group. In these units `kl_weight` =
    `reward_weight`, the default, is KL weight 1 / beta on the reward log r: that of the posterior
    (arXiv 2509.01632). As published, each KL is differentiated at the points visited, and not
    through which points are visited: the score function hears of the reward to come, and not of the
    KL to come. The step from x[k] then tilts the prior's by exp E_post[log r | x[k-1]] where the
    posterior tilts by E_prior[r | x[k-1]]: wrong wherever the KL to come depends on x[k-1]. For
    linear log r on Gaussian data it doesn't, and the optimum is the posterior; in general use
    `kl_regularised_reinforce`.
    """

    reward_weight: float = 1.0
    kl_weight: float = 1.0
    divergence: Divergence = gaussian_kl

    @property
    def passes(self) -> int:
        return 1

    def advantage(self, reward: Tensor) -> Tensor:
        return leave_one_out(reward)

    def loss(self, steps: Steps) -> Tensor:
        charge = self.divergence(steps.kernel, steps.prior(), steps.level)
        gain = steps.advantage * steps.log_prob
        return self.kl_weight * charge - self.reward_weight * gain


def published_dpok(diffusion: GaussianDiffusion) -> Dpok:
    """DPOK with the weights of its code: reward 10, squared difference of noises 0.01.

    For beta = 1. Its optimum is not the posterior, even where that of `Dpok()` is.
    """
    return Dpok(reward_weight=10.0, kl_weight=0.01, divergence=noise_difference(diffusion))


def kl_regularised_reinforce(group: int) -> Objective:
    """The unbiased gradient of KL(posterior | target), for `Finetuner(objective=...)`.

    The KL to come is part of the return, beta log r - log_ratio, so the optimum is that of
    trajectory balance. Needs `Mix(on_policy=group, data=0)`: see `core.kl_reinforce_loss`.
    """

    def objective(log_z: Tensor, log_ratio: Tensor, log_reward: Tensor, beta: float) -> Tensor:
        return kl_reinforce_loss(log_weight(log_reward, log_ratio, beta), group)

    return objective


def _gaussian(kernel: Kernel) -> GaussianKernel:
    if not isinstance(kernel, GaussianKernel):
        raise InputError(
            f"a KL in closed form needs Gaussian steps, not {type(kernel).__name__}; use Ddpo, or"
            " kl_regularised_reinforce, which needs no such KL"
        )
    return kernel
