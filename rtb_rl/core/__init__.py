"""The mathematics of relative trajectory balance; imports torch and the standard library only.

Level k runs 0..K. **x[0] is clean data, x[K] is pure noise.** The batch is the first axis.
Log-densities are in nats, float32 or better, one per row.

    symbol                         here              meaning
    x_0, x_k, x_K                  x0, x, x[K]       clean point, noisy point, start of the chain
    alpha_k, sigma_k               signal, noise     x_k = signal[k] x_0 + noise[k] eps,  eps ~ N(0,
    I) p(x_{k-1} | x_k, c)            Kernel            law of one denoising step, spread s_k > 0
    D(x_k, k, c)                   Denoiser          what predicts clean data from noisy data
    log r(x_0, c)                  log_reward        black box, nats, without beta
    log p_post - log p_prior       log_ratio         summed over the steps of one path
    beta log r - log_ratio         log_weight        its mean under the posterior is a lower bound
    of log Z log Z - log_weight             residual          zero on every path exactly when the
    posterior is right

Source: relative trajectory balance, arXiv 2405.20971, section 2.
"""

from rtb_rl.core.gaussian import GaussianDiffusion, ScaledPrediction
from rtb_rl.core.kernels import GaussianKernel
from rtb_rl.core.log_z import ConditionalLogZ, GroupMeanLogZ, ScalarLogZ
from rtb_rl.core.objective import (
    backward_in_chunks,
    effective_sample_size,
    elbo,
    huber,
    importance_log_z,
    log_weight,
    random_levels,
    residual,
    rtb_loss,
    square,
)
from rtb_rl.core.parameterization import NoisePrediction, ScorePrediction, VelocityPrediction
from rtb_rl.core.protocols import Denoiser, Diffusion, Kernel, LogReward, LogZ
from rtb_rl.core.replay import SampleReplay
from rtb_rl.core.sampler import Sampler
from rtb_rl.core.schedules import (
    Schedule,
    cosine_schedule,
    linear_schedule,
    log_snr_schedule,
    vp_schedule,
    zero_terminal_signal,
)
from rtb_rl.core.trajectory import Trajectory, log_ratio, noise_back, rollout, rollout_against

__all__ = [
    "ConditionalLogZ",
    "Denoiser",
    "Diffusion",
    "GaussianDiffusion",
    "GaussianKernel",
    "GroupMeanLogZ",
    "Kernel",
    "LogReward",
    "LogZ",
    "NoisePrediction",
    "SampleReplay",
    "Sampler",
    "ScalarLogZ",
    "ScaledPrediction",
    "Schedule",
    "ScorePrediction",
    "Trajectory",
    "VelocityPrediction",
    "backward_in_chunks",
    "cosine_schedule",
    "effective_sample_size",
    "elbo",
    "huber",
    "importance_log_z",
    "linear_schedule",
    "log_ratio",
    "log_snr_schedule",
    "log_weight",
    "noise_back",
    "random_levels",
    "residual",
    "rollout",
    "rollout_against",
    "rtb_loss",
    "square",
    "vp_schedule",
    "zero_terminal_signal",
]
