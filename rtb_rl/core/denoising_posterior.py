"""Posteriors of masked diffusion without paths: discrete denoising posterior prediction."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from rtb_rl.core.kernels import token_log_probs
from rtb_rl.core.masked import LogProbs, MaskedDiffusion, RevealPrediction
from rtb_rl.core.protocols import Condition, Denoiser

LogZOfPoint = Callable[[Tensor, Tensor, Condition], Tensor]
"""log Z(x, level, condition) of a noisy point: [batch]."""


def denoising_posterior_loss(
    diffusion: MaskedDiffusion,
    posterior: Denoiser,
    prior: Denoiser,
    log_z: LogZOfPoint,
    x0: Tensor,
    condition: Condition,
    log_reward: Tensor,
    beta: float,
    *,
    generator: Generator,
) -> Tensor:
    """(log p_post(x0 | x) - log p_prior(x0 | x) - beta log r(x0) + log Z(x))^2 at a noised x.

    DDPP-LB, arXiv 2410.08134. One evaluation of the network for each point x0, which may come from
    anywhere (a replay); log Z is learned for every noisy point. Both denoisers count as products
    over positions, so that the loss can reach zero only where one masked token is left or the
    tokens are independent. Mean over the batch; levels are drawn uniformly.
    """
    level = torch.randint(
        1, diffusion.levels + 1, (len(x0),), generator=generator, device=x0.device
    )
    x = diffusion.corrupt(x0, level, generator=generator)
    masked = x == diffusion.mask
    with torch.no_grad():
        reference = _log_prob(prior(x, level, condition), x0, masked)
    ratio = _log_prob(posterior(x, level, condition), x0, masked) - reference
    free_energy = log_z(x, level, condition)
    if free_energy.shape != ratio.shape:
        raise ValueError(
            f"log_z returned {tuple(free_energy.shape)} for {len(x0)} points; return one number a"
            f" point, shape ({len(x0)},)"
        )
    return (free_energy + ratio - beta * log_reward).square().mean()


def _log_prob(prediction: LogProbs | RevealPrediction, x0: Tensor, masked: Tensor) -> Tensor:
    log_probs = prediction.log_probs if isinstance(prediction, RevealPrediction) else prediction
    return token_log_probs(log_probs, x0, masked).sum(1)
