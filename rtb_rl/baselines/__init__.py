"""Other ways to sample p(x) r(x)^beta / Z, over the same Diffusion and Denoiser."""
