"""Objectives beside relative trajectory balance, of the same log-weights and log-ratios.

`log_weight` [batch] comes in groups of `group` neighbours that share a condition. Losses are
scalars whose gradient by the log-ratios is what the method asks for.
"""

from torch import Tensor

from rtb_rl.core.objective import check_same_paths, residual


def log_variance_loss(log_weight: Tensor, group: int) -> Tensor:
    """Half the variance of the log-weights in each group, with 1 / (K - 1) (VarGrad).

    On-policy its gradient is an unbiased one of KL(posterior | target) for every K >= 2; 1 / K
    shrinks it by (K - 1) / K. arXiv 2010.10436, 2405.20971 section 2.2.
    """
    return _in_groups(log_weight, group).var(1, correction=1).mean() / 2


def kl_reinforce_loss(log_weight: Tensor, group: int) -> Tensor:
    """Score-function gradient of KL(posterior | target), the mean of the others as baseline.

    KL-regularised reinforcement learning with reward log r and KL weight 1 / beta; its optimum is
    that of trajectory balance. On-policy paths only. Its gradient equals that of
    `log_variance_loss`, path by path.
    """
    weight = _in_groups(log_weight, group)
    baseline = (weight.sum(1, keepdim=True) - weight) / (group - 1)
    return ((weight - baseline).detach() * weight).mean()


def published_rl_loss(log_ratio: Tensor, log_reward: Tensor, weight: float) -> Tensor:
    """The RL baseline of the code published with arXiv 2405.20971: a negative control.

    REINFORCE on r (not log r) with the batch mean as baseline, plus `weight` times the squared
    log-ratio. Its optimum is prior * exp(r / (2 weight)), whatever the weight: not the posterior.
    """
    check_same_paths(log_reward, log_ratio)
    reward = log_reward.exp()
    advantage = (reward - reward.mean()).detach()
    return (weight * log_ratio.square() - advantage * log_ratio).mean()


def trust_pcl_loss(log_z: Tensor, log_ratio: Tensor, log_reward: Tensor, alpha: float) -> Tensor:
    """Mean (V + alpha log_ratio - log r)^2 with V = alpha log Z, for KL weight alpha = 1 / beta.

    alpha^2 times the loss of trajectory balance (arXiv 2509.01632).
    """
    check_same_paths(log_reward, log_ratio)
    return (alpha * residual(log_z, log_reward / alpha - log_ratio)).square().mean()


def _in_groups(log_weight: Tensor, group: int) -> Tensor:
    if group < 2:
        raise ValueError(
            f"a group of {group} path(s) has no other path to compare with; use 2 or more"
        )
    if len(log_weight) % group:
        raise ValueError(
            f"{len(log_weight)} paths can't be cut into groups of {group}; give a multiple of it"
        )
    return log_weight.reshape(-1, group)
