"""Other ways to sample p(x) r(x)^beta / Z, over the same Diffusion and Denoiser."""

from rtb_rl.baselines.draws import Draws

__all__ = ["Draws"]
