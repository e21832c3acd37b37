"""Where the paths of an update come from, and which estimates of log Z can group them."""

from dataclasses import astuple, dataclass

from rtb_rl.core import ConditionalLogZ, GroupMeanLogZ, ScalarLogZ
from rtb_rl.errors import InputError

LearnedLogZ = ScalarLogZ | ConditionalLogZ | GroupMeanLogZ


@dataclass(frozen=True)
class Mix:
    """Paths drawn for each condition in an update, by where they come from."""

    on_policy: int = 7
    """Drawn from the posterior."""
    prior: int = 0
    """Drawn from the prior."""
    data: int = 1
    """The condition's own data point, noised (0 or 1: a group must not share an endpoint)."""
    replay: int = 0
    """Final points seen before, noised; each with the condition it was drawn for."""
    widened: int = 0
    """Drawn from the posterior with wider kernels."""

    @property
    def total(self) -> int:
        return self.on_policy + self.prior + self.data + self.replay + self.widened


def check_mix(mix: Mix, log_z: LearnedLogZ) -> None:
    """InputError for a mix that can't be drawn, or not be grouped by this estimate of log Z."""
    if min(astuple(mix)) < 0 or mix.total == 0:
        raise InputError(f"the mix {mix} must hold at least one path and no negative number")
    if mix.data > 1:
        raise InputError(
            f"mix.data is {mix.data}: noising one data point more than once makes a group that "
            f"shares"
            " its endpoint, in which the reward cancels; use 1"
        )
    if mix.replay and not (mix.on_policy or mix.prior or mix.widened):
        raise InputError(
            "mix.replay remembers points that were drawn; set mix.on_policy, mix.prior or"
            " mix.widened to 1 or more"
        )
    if isinstance(log_z, GroupMeanLogZ):
        if mix.replay:
            raise InputError(
                "a group mean needs all its paths to share a condition, and replayed points bring"
                " their own; use a learned log Z or set mix.replay to 0"
            )
        if mix.total % log_z.size:
            raise InputError(
                f"groups of {log_z.size} don't divide the {mix.total} paths of a condition; make "
                f"them"
                " equal"
            )
