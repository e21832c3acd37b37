"""Learning rates that change while something is trained."""

import math


def cosine(rate: float, step: int, steps: int) -> float:
    """From `rate` at step 0 to zero at `steps`, along half a cosine."""
    return rate * (1 + math.cos(math.pi * step / steps)) / 2
