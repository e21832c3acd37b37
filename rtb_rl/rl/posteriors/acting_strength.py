"""The strength at which a posterior of many acts, found by its divergence from the prior."""

import math
import time
from dataclasses import asdict
from pathlib import Path

import torch

from rtb_rl.core import Denoiser, rollout_against
from rtb_rl.nn.correction import ScaledCorrection
from rtb_rl.rl.critics.critic import Critic
from rtb_rl.rl.data.dataset import TransitionDataset, data_facts
from rtb_rl.rl.posteriors.amortised import (
    AmortisedSettings,
    StrengthBlind,
    diagnose_strength,
    with_strength,
)
from rtb_rl.rl.posteriors.prior import ActionDiffusion
from rtb_rl.rl.posteriors.strength import largest_within
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import fingerprint

STATES, PATHS = 256, 16
TOLD = 9  # strengths of the table


def fit_acting_strength(
    directory: str | Path,
    dataset: TransitionDataset,
    prior: ActionDiffusion,
    model: ScaledCorrection,
    critic: Critic,
    settings: AmortisedSettings,
    nats: float,
    *,
    seed: int = 0,
) -> float:
    """The largest beta of the range at which `model`'s paths are at most `nats` from the prior's.

    results.json has it, the divergence at some strengths of the range (`divergence`), and
    diagnostics at the one found. InputError where the weakest strength is not within.
    """
    made_of = {"prior": fingerprint(prior), "model": fingerprint(model)}
    config = {**data_facts(dataset), "amortised": asdict(settings), **made_of, "seed": seed}
    run = Run(directory, {**config, "kl": nats})
    if run.results is not None:
        return run.results["beta"]
    begun, data = time.monotonic(), dataset.to(prior.device)

    def divergence(beta: float) -> float:
        generator = generator_for(seed, "acting strength", device=prior.device)
        observations = data.sample(STATES, generator=generator).observations
        return path_divergence(prior, model, observations, beta, generator=generator)

    beta = largest_within(divergence, nats, settings.low, settings.high)
    told = {f"{one:.4g}": divergence(one) for one in _some_strengths(settings)}
    diagnostics = diagnose_strength(data, prior, model, critic, settings, beta, seed=seed)
    seconds = time.monotonic() - begun
    run.finish({"seconds": seconds, "beta": beta, "divergence": told, "diagnostics": diagnostics})
    return beta


@torch.no_grad()
def path_divergence(
    prior: ActionDiffusion,
    posterior: Denoiser,
    observations: torch.Tensor,
    beta: float,
    *,
    generator: torch.Generator,
) -> float:
    """KL of the posterior's paths from the prior's at one strength, nats: the mean over 16 paths in
    each state [states, observation size]. No less than that of the actions.
    """
    each = with_strength(observations.repeat_interleave(PATHS, dim=0), beta)
    blind = StrengthBlind(prior.denoiser)
    given = (prior.diffusion, posterior, blind, each, len(each))
    _, ratio = rollout_against(*given, generator=generator)
    return float(ratio.double().mean())


def _some_strengths(settings: AmortisedSettings) -> list[float]:
    step = math.log(settings.high / settings.low) / (TOLD - 1)
    return [settings.low * math.exp(step * i) for i in range(TOLD)]
