"""Reveal laws on three positions, of every kind."""

from rtb_rl.core import (
    FixedOrder,
    IndependentReveals,
    RandomOrder,
    RevealLaw,
    cosine_masking,
    linear_masking,
)

LENGTH = 3
LAWS: dict[str, RevealLaw] = {
    "linear": IndependentReveals(linear_masking(4), LENGTH),
    "cosine": IndependentReveals(cosine_masking(3), LENGTH),
    "random_order": RandomOrder(LENGTH),
    "random_order-2": RandomOrder(LENGTH, per_step=2),
    "fixed_order": FixedOrder([2, 0, 1]),
    "fixed_order-2": FixedOrder([2, 0, 1], per_step=2),
    "one_step": RandomOrder(LENGTH, per_step=7),
}
