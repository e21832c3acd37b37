"""Errors that a user can act on: one line that names both sides of a mismatch and the cure."""


class InputError(ValueError):
    """Something given to the package does not fit; raised before any work is lost."""


class CheckpointError(RuntimeError):
    """A checkpoint can't be used: corrupted, unsafe, or of another shape."""


class NonFiniteError(FloatingPointError):
    """Training met NaN or infinity; names the step, the term and the last good checkpoint."""
