"""Choosing beta from prior and critic alone: how much of the behaviour prior a posterior keeps.

Two rules, neither of which looks at an environment. Both ask for the largest beta at which the mean
over states of the data

    of the effective sample size of prior draws, weighted by exp(beta log r), is still a share
    of the posterior's KL from the prior is still within so many nats

The first trains nothing, and sees no more of log r than some hundred draws a state do: where the
critic is best far from the data it says nothing of it. The second asks a posterior of all strengths
(`amortised`), which goes there.
"""

import math
from collections.abc import Callable

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
FAR = 3.0  # nats, as of a policy that keeps one in twenty of the prior's draws
LOG_HALVINGS = 10  # of the logarithm of a range: to 0.3 % from 0.3 to 10


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


def check_rule(beta: float | None, ess: float | None, kl: float | None) -> None:
    """InputError for more than one way to beta, and for a share or a divergence that none keeps."""
    given = [
        words
        for value, words in (
            (beta, f"beta {beta}"),
            (ess, f"an effective sample size of {ess}"),
            (kl, f"a divergence of {kl} nats"),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise InputError(
            f"{' and '.join(given)} are both given, and each says what beta is; give one of them"
        )
    if ess is not None and not 1 / DRAWS < ess < 1:
        raise InputError(
            f"an effective sample size of {ess:g} was asked for; give a share between 1/{DRAWS}"
            " and 1, such as 0.3"
        )
    if kl is not None and not 0 < kl < math.inf:
        raise InputError(
            f"a divergence of {kl:g} nats from the prior was asked for; give a positive number,"
            " such as 0.5"
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


def largest_within(
    divergence: Callable[[float], float], nats: float, low: float, high: float
) -> float:
    """The largest beta of the range whose `divergence(beta)` is at most `nats`; by bisection of log
    beta, since it rises: d KL / d beta = beta Var(log r) under the posterior.

    InputError where not even `low` is within.
    """
    if divergence(high) <= nats:
        return high
    if (least := divergence(low)) > nats:
        raise InputError(
            f"the posterior is {least:.3g} nats from the prior at beta {low:g} already, the weakest"
            f" it is trained for, and {nats:g} were asked for; ask for more, or train for weaker"
            " strengths"
        )
    for _ in range(LOG_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if divergence(middle) <= nats else (low, middle)
    return low


def warning_of(divergence: float) -> str | None:
    """What to say of a posterior whose paths are that many nats from the prior's; None: nothing."""
    if divergence <= FAR:
        return None
    return (
        f"its paths are {divergence:.1f} nats from the prior's: it acts where the data hardly have"
        " actions and the critic may be wrong; --kl 0.5 finds a beta that stays nearer"
    )
