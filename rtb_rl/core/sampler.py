"""What a user holds as 'the prior' or 'the posterior'."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rtb_rl.core import conditions
from rtb_rl.core.objective import effective_sample_size, log_weight
from rtb_rl.core.protocols import Condition, Denoiser, Diffusion, LogReward
from rtb_rl.core.rewards import checked_log_reward
from rtb_rl.core.trajectory import rollout_against


@dataclass(frozen=True)
class Sampler:
    """A diffusion with a denoiser: draws final points."""

    diffusion: Diffusion
    denoiser: Denoiser

    @torch.no_grad()
    def sample(self, condition: Condition, n: int, *, generator: Generator) -> Tensor:
        """`n` draws for each row of the condition: [rows, n, *event]; without condition [n,
        *event].
        """
        rows = conditions.count(condition)
        each = conditions.repeat(condition, n) if n > 1 else condition
        x = self.diffusion.start(n * (rows or 1), generator=generator)
        for k in range(self.diffusion.levels, 0, -1):
            level = torch.full((x.shape[0],), k, dtype=torch.int64, device=x.device)
            x = self.diffusion.kernel(self.denoiser(x, level, each), x, level).sample(
                generator=generator
            )
        return x if rows is None else x.reshape(rows, n, *x.shape[1:])


@dataclass(frozen=True)
class ResampledSampler:
    """Posterior draws corrected by importance resampling towards prior * r^beta.

    For each draw `candidates` are drawn, weighed by r^beta p_prior / p_post of their paths, and one
    is kept; the law of what is kept tends to the target as `candidates` grows.
    """

    diffusion: Diffusion
    denoiser: Denoiser
    prior: Denoiser
    log_reward: LogReward
    beta: float = 1.0
    candidates: int = 8

    @torch.no_grad()
    def sample(self, condition: Condition, n: int, *, generator: Generator) -> Tensor:
        """As `Sampler.sample`.

        ValueError where fewer than `n` candidates of a row are effective (then resampling would
        only repeat a few) or none has a positive reward, and for rewards of another shape than
        [batch]; NonFiniteError where one is NaN or plus infinity.
        """
        rows = conditions.count(condition) or 1
        drawn = n * self.candidates
        each = conditions.repeat(condition, drawn)
        paths, ratio = rollout_against(
            self.diffusion, self.denoiser, self.prior, each, rows * drawn, generator=generator
        )
        found = self.log_reward(paths.x0, each)
        log_reward = checked_log_reward(found, rows * drawn, "log_reward")
        weight = log_weight(log_reward, ratio, self.beta).double().reshape(rows, drawn)
        if bool((weight == -torch.inf).all(1).any()):
            raise ValueError(
                f"all {drawn} candidates of a row have reward zero; give more candidates, or a"
                " posterior or prior that draws points of positive reward"
            )
        effective = float(effective_sample_size(weight).min()) * drawn
        if n > 1 and effective < n:
            raise ValueError(
                f"only {effective:.1f} of {drawn} candidates are effective, fewer than the {n}"
                " draws asked for; give more candidates, or train the posterior longer"
            )
        index = systematic_resampling(weight.softmax(1), n, generator=generator)
        event = paths.x0.shape[1:]
        kept = paths.x0.reshape(rows, drawn, *event)[torch.arange(rows)[:, None], index]
        return kept[0] if condition is None else kept


def systematic_resampling(weights: Tensor, n: int, *, generator: Generator) -> Tensor:
    """`n` indices for each row of `weights` [rows, m], in random order: int64 [rows, n].

    One uniform number a row places n evenly spaced points on the cumulated weights, so that an
    index of weight w (a row sums to one) comes floor(n w) or ceil(n w) times.
    """
    rows, device = len(weights), weights.device
    offset = torch.rand((rows, 1), generator=generator, device=device, dtype=weights.dtype)
    points = (torch.arange(n, device=device) + offset) / n
    index = torch.searchsorted(weights.cumsum(1), points).clamp(max=weights.shape[1] - 1)
    return index.gather(1, torch.rand((rows, n), generator=generator, device=device).argsort(1))
