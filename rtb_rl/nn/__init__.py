"""Small networks."""

from rtb_rl.nn.correction import Correction, ScaledCorrection, scaled_correction, with_scale
from rtb_rl.nn.ensemble import EnsembleMLP
from rtb_rl.nn.langevin import LangevinDenoiser
from rtb_rl.nn.mlp import MLP, ResidualMLP
from rtb_rl.nn.reveal import LearnedReveal
from rtb_rl.nn.spread import LearnedSpread
from rtb_rl.nn.start import LearnedStart

__all__ = [
    "MLP",
    "Correction",
    "EnsembleMLP",
    "LangevinDenoiser",
    "LearnedReveal",
    "LearnedSpread",
    "LearnedStart",
    "ResidualMLP",
    "ScaledCorrection",
    "scaled_correction",
    "with_scale",
]
