"""Diffusion posteriors p(x) r(x)^beta / Z by relative trajectory balance."""

__version__ = "0.1.0"
