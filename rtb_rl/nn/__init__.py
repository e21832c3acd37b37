"""Small networks."""

from rtb_rl.nn.ensemble import EnsembleMLP
from rtb_rl.nn.langevin import LangevinDenoiser
from rtb_rl.nn.mlp import MLP, ResidualMLP
from rtb_rl.nn.spread import LearnedSpread

__all__ = ["MLP", "EnsembleMLP", "LangevinDenoiser", "LearnedSpread", "ResidualMLP"]
