"""Offline RL as a Task: pi(a|s) proportional to mu(a|s) exp(beta Q(s, a))."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import GaussianDiffusion, LogReward
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.rl.critics.critic import Critic
from rtb_rl.rl.data.dataset import TransitionDataset
from rtb_rl.training.task import DrawConditions, Task


def critic_log_reward(critic: Critic) -> LogReward:
    """log r(a | s) = Q(s, clip(a, -1, 1)) - V(s), or Q alone where the critic has no `v`.

    V depends on the state only, so it moves log Z(s) and leaves the posterior as it is; with it log
    Z stays near zero and is easier to learn. No tanh and no Jacobian: prior and reward live in one
    space, that of the actions.
    """
    value: Callable[[Tensor], Tensor] | None = getattr(critic, "v", None)

    def log_reward(x0: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, Tensor)
        q = critic.q(condition, x0.clamp(-1, 1))
        return q if value is None else q - value(condition)

    return log_reward


def critic_gradient(critic: Critic) -> Callable[[Tensor, Condition], Tensor]:
    """d Q(s, a) / d a at the clipped action, for the Langevin term.

    By the critic's own `action_gradient` where it has one, else by autograd; then a critic that is
    not differentiable is an InputError.
    """
    own: Callable[[Tensor, Tensor], Tensor] | None = getattr(critic, "action_gradient", None)

    def gradient(x0: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, Tensor)
        action = x0.clamp(-1, 1).detach()
        if own is not None:
            return own(condition, action)
        with torch.enable_grad():
            q = critic.q(condition, action.requires_grad_())
            if not q.requires_grad:
                raise InputError(
                    f"the Langevin term needs the gradient of {type(critic).__name__}.q by the"
                    " action, and there is none; make q differentiable or leave the term out"
                )
            (slope,) = torch.autograd.grad(q.sum(), action)
        return slope

    return gradient


def dataset_rows(dataset: TransitionDataset) -> DrawConditions:
    """Observations of the data set, each with the action taken there."""

    def draw(n: int, *, generator: Generator) -> tuple[Condition, Tensor | None]:
        batch = dataset.sample(n, generator=generator)
        return batch.observations, batch.actions

    return draw


def offline_rl_task(
    dataset: TransitionDataset,
    diffusion: GaussianDiffusion,
    prior: nn.Module,
    posterior: nn.Module,
    critic: Critic,
) -> Task:
    """Fine-tuning of a behaviour prior towards actions that the critic values."""
    return Task(
        name=dataset.name,
        diffusion=diffusion,
        prior=prior,
        posterior=posterior,
        log_reward=critic_log_reward(critic),
        draw_conditions=dataset_rows(dataset),
    )
