"""Choosing beta from prior and critic alone: how much of the behaviour prior a posterior keeps.

The weights exp(beta log r) of draws of the prior have an effective sample size that falls from 1 at
beta = 0 as the target moves away from the data. The rule: the largest beta at which its mean over
states of the data is still a given share. It looks at no environment and trains nothing.
"""

import torch
from torch import Generator, Tensor

from rtb_rl.core import conditions, effective_sample_size
from rtb_rl.errors import InputError
from rtb_rl.rl.critics.critic import Critic
from rtb_rl.rl.data.dataset import TransitionDataset
from rtb_rl.rl.posteriors.prior import ActionDiffusion
from rtb_rl.rl.posteriors.task import critic_log_reward

ROWS, DRAWS = 256, 256
LARGEST = 1e4
HALVINGS = 40


@torch.no_grad()
def beta_for_ess(
    prior: ActionDiffusion,
    critic: Critic,
    dataset: TransitionDataset,
    share: float,
    *,
    generator: Generator,
) -> float:
    """The largest beta, at most 10,000, with a mean effective sample size of at least `share`.

    Of 256 draws of the prior in each of 256 states of the data; `share` is between 1 / 256 and 1.
    """
    observations = dataset.to(prior.device).sample(ROWS, generator=generator).observations
    actions = prior.sampler.sample(observations, DRAWS, generator=generator)
    each = conditions.repeat(observations, DRAWS)
    log_reward = critic_log_reward(critic)(actions.flatten(0, 1), each).reshape(ROWS, DRAWS)
    return largest_beta(log_reward.double(), share)


def check_share(share: float, beta: float | None) -> None:
    """InputError for a share that no draws can keep, and for one beside a beta."""
    if beta is not None:
        raise InputError(
            f"beta {beta:g} and an effective sample size of {share:g} are both given; beta follows"
            " from the second: give one of them"
        )
    if not 1 / DRAWS < share < 1:
        raise InputError(
            f"an effective sample size of {share:g} was asked for; give a share between 1/{DRAWS}"
            " and 1, such as 0.3"
        )


def largest_beta(log_reward: Tensor, share: float) -> float:
    """The largest beta at which weights exp(beta log_reward) [rows, draws] keep that mean share.

    By bisection, since the share of every row falls with beta: its logarithm is 2 K(beta) -
    K(2 beta), K the cumulant generating function, which is convex. LARGEST where no beta up to it
    goes below the share.
    """

    def kept(beta: float) -> float:
        return float(effective_sample_size(beta * log_reward).mean())

    if kept(LARGEST) >= share:
        return LARGEST
    low, high = 0.0, LARGEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) >= share else (low, middle)
    return low
