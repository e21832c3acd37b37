"""Several seeds trained at once, as one stacked network for each stage."""

from rtb_rl.rl.seeds.stages import fit_critics, fit_posteriors, fit_priors

__all__ = ["fit_critics", "fit_posteriors", "fit_priors"]
