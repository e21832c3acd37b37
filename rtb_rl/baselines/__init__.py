"""Other ways to sample p(x) r(x)^beta / Z, over the same Diffusion and Denoiser."""

from rtb_rl.baselines.adjoint import AdjointMatching
from rtb_rl.baselines.denoising import DenoisingPosterior, DenoisingSettings
from rtb_rl.baselines.draws import Draws
from rtb_rl.baselines.guidance import dps, lgd_mc, noised_logits_guidance
from rtb_rl.baselines.guidance_steps import (
    likelihood_step,
    normalised_step,
    posterior_mean_step,
)
from rtb_rl.baselines.policy_gradient import PolicyGradient
from rtb_rl.baselines.selection import (
    ImportanceReference,
    best_of_n,
    importance_reference,
    importance_resampling,
)
from rtb_rl.baselines.steering import (
    difference_potential,
    fk_steering,
    max_potential,
    sum_potential,
    twisted_smc,
)
from rtb_rl.baselines.surrogates import (
    ClippedDdpo,
    Ddpo,
    Dpok,
    kl_regularised_reinforce,
    published_dpok,
)
from rtb_rl.baselines.trainer import BaselineSettings
from rtb_rl.baselines.value_decoding import svdd

__all__ = [
    "AdjointMatching",
    "BaselineSettings",
    "ClippedDdpo",
    "Ddpo",
    "DenoisingPosterior",
    "DenoisingSettings",
    "Dpok",
    "Draws",
    "ImportanceReference",
    "PolicyGradient",
    "best_of_n",
    "difference_potential",
    "dps",
    "fk_steering",
    "importance_reference",
    "importance_resampling",
    "kl_regularised_reinforce",
    "lgd_mc",
    "likelihood_step",
    "max_potential",
    "noised_logits_guidance",
    "normalised_step",
    "posterior_mean_step",
    "published_dpok",
    "sum_potential",
    "svdd",
    "twisted_smc",
]
