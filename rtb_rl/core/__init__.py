"""The mathematics of relative trajectory balance; imports torch and the standard library only.

Level k runs 0..K. **x[0] is clean data, x[K] is pure noise.** The batch is the first axis.
Log-densities are in nats, float32 or better, one per row.

    symbol                     here            meaning
    x_0, x_k, x_K              x0, x, x[K]     clean point, noisy point, start of the chain
    alpha_k, sigma_k           signal, noise   x_k = signal[k] x_0 + noise[k] eps, eps ~ N(0, I)
    alpha_k of tokens          kept            the probability that a token is not masked at level k
    rho_k                      reveals         the probability that a masked token is revealed
    p(x_{k-1} | x_k, c)        Kernel          law of one denoising step
    D(x_k, k, c)               Denoiser        what predicts clean data from noisy data
    log r(x_0, c)              log_reward      black box, nats, without beta
    log p_post - log p_prior   log_ratio       summed over the steps of one path; for tokens, one
                                               term for each, at the step that reveals it
    beta log r - log_ratio     log_weight      its mean under the posterior is at most log Z
    log Z - log_weight         residual        zero on every path exactly when the posterior is
                                               right

Source: relative trajectory balance, arXiv 2405.20971, section 2.
"""

from rtb_rl.core.alternatives import (
    kl_reinforce_loss,
    log_variance_loss,
    published_rl_loss,
    trust_pcl_loss,
)
from rtb_rl.core.denoising_posterior import denoising_posterior_loss
from rtb_rl.core.gaussian import GaussianDiffusion, ScaledPrediction
from rtb_rl.core.infilling import Infilling, TokenLogits
from rtb_rl.core.kernels import GaussianKernel, UnmaskingKernel
from rtb_rl.core.last_steps import PriorInLastSteps, acting_network, steps_of_prior
from rtb_rl.core.log_z import ConditionalLogZ, GroupMeanLogZ, ScalarLogZ
from rtb_rl.core.masked import MaskedDiffusion, RevealPrediction
from rtb_rl.core.objective import (
    backward_in_chunks,
    effective_sample_size,
    elbo,
    eubo,
    huber,
    importance_eubo,
    importance_log_z,
    linex,
    log_weight,
    penalty_of,
    random_levels,
    residual,
    rtb,
    rtb_loss,
    square,
)
from rtb_rl.core.on_demand import OnDemand, OnDemandLogProbs
from rtb_rl.core.parameterization import NoisePrediction, ScorePrediction, VelocityPrediction
from rtb_rl.core.protocols import Denoiser, Diffusion, Kernel, LogReward, LogZ, Objective
from rtb_rl.core.replay import SampleReplay
from rtb_rl.core.reveals import FixedOrder, IndependentReveals, RandomOrder, RevealLaw
from rtb_rl.core.sampler import ResampledSampler, Sampler, systematic_resampling
from rtb_rl.core.schedules import (
    MaskingSchedule,
    Schedule,
    cosine_masking,
    cosine_schedule,
    linear_masking,
    linear_schedule,
    log_snr_schedule,
    vp_schedule,
    zero_terminal_signal,
)
from rtb_rl.core.start import StandardStart, StartStep
from rtb_rl.core.trajectory import (
    Trajectory,
    log_ratio,
    noise_back,
    rollout,
    rollout_against,
    rollout_step_by_step,
)

__all__ = [
    "ConditionalLogZ",
    "Denoiser",
    "Diffusion",
    "FixedOrder",
    "GaussianDiffusion",
    "GaussianKernel",
    "GroupMeanLogZ",
    "IndependentReveals",
    "Infilling",
    "Kernel",
    "LogReward",
    "LogZ",
    "MaskedDiffusion",
    "MaskingSchedule",
    "NoisePrediction",
    "Objective",
    "OnDemand",
    "OnDemandLogProbs",
    "PriorInLastSteps",
    "RandomOrder",
    "ResampledSampler",
    "RevealLaw",
    "RevealPrediction",
    "SampleReplay",
    "Sampler",
    "ScalarLogZ",
    "ScaledPrediction",
    "Schedule",
    "ScorePrediction",
    "StandardStart",
    "StartStep",
    "TokenLogits",
    "Trajectory",
    "UnmaskingKernel",
    "VelocityPrediction",
    "acting_network",
    "backward_in_chunks",
    "cosine_masking",
    "cosine_schedule",
    "denoising_posterior_loss",
    "effective_sample_size",
    "elbo",
    "eubo",
    "huber",
    "importance_eubo",
    "importance_log_z",
    "kl_reinforce_loss",
    "linear_masking",
    "linear_schedule",
    "linex",
    "log_ratio",
    "log_snr_schedule",
    "log_variance_loss",
    "log_weight",
    "noise_back",
    "penalty_of",
    "published_rl_loss",
    "random_levels",
    "residual",
    "rollout",
    "rollout_against",
    "rollout_step_by_step",
    "rtb",
    "rtb_loss",
    "square",
    "steps_of_prior",
    "systematic_resampling",
    "trust_pcl_loss",
    "vp_schedule",
    "zero_terminal_signal",
]
