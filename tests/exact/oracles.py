"""Old names of what `rtb_rl.tasks.toy` now holds."""

from rtb_rl.tasks.toy import GaussianDenoiser as gaussian_denoiser
from rtb_rl.tasks.toy import chain_of, denoiser_of, squared_reward, tilt

__all__ = ["chain_of", "denoiser_of", "gaussian_denoiser", "squared_reward", "tilt"]
