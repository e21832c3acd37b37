"""A posterior whose last steps are the prior's own."""

import torch
from torch import Tensor, nn

from rtb_rl.core import conditions
from rtb_rl.core.protocols import Condition, Denoiser


class PriorInLastSteps(nn.Module):
    """The posterior, but in the last `steps` steps (levels 1..steps) the prior itself.

    Near the end next to nothing of a reward is open, so that the exact posterior hardly differs
    from the prior there; but steps are narrow, and what one network learns at other levels leaks
    into these, at a price in nats. Here their log-ratio is exactly zero.

    `steps` may be set until training begins, and is kept with the weights. Both networks predict
    tensors of the shape of x.
    """

    steps: Tensor

    def __init__(self, posterior: nn.Module, prior: nn.Module, steps: int = 0):
        super().__init__()
        self.posterior = posterior
        self.prior = prior
        self.register_buffer("steps", torch.tensor(steps))

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        last = level <= self.steps
        if not bool(last.any()):
            return self.posterior(x, level, condition)
        with torch.no_grad():
            if bool(last.all()):
                return self.prior(x, level, condition)
            theirs = last.nonzero()[:, 0]
            reference = self.prior(x[theirs], level[theirs], conditions.take(condition, theirs))
        own = (~last).nonzero()[:, 0]
        prediction = self.posterior(x[own], level[own], conditions.take(condition, own))
        both = torch.cat([prediction, reference.to(prediction.dtype)])
        return both[torch.cat([own, theirs]).argsort()]


def steps_of_prior(posterior: nn.Module) -> int:
    """How many of its last steps are the prior's."""
    return int(posterior.steps) if isinstance(posterior, PriorInLastSteps) else 0


def shared_steps(denoiser: Denoiser, other: Denoiser) -> int:
    """In how many last steps the two are one and the same."""
    if isinstance(denoiser, PriorInLastSteps) and denoiser.prior is other:
        return steps_of_prior(denoiser)
    return 0


def acting_network(posterior: nn.Module) -> nn.Module:
    """What acts in the other steps."""
    return posterior.posterior if isinstance(posterior, PriorInLastSteps) else posterior
